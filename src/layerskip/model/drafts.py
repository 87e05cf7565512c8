"""Inputs and outputs of drafting and of whole rounds.

Shapes: B rows, K drafts a row, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from layerskip.model.draw import Draw

CONFIDENCE_CLASSES = 8
"""Classes of drafts by their probability: how likely a draft is accepted depends on its class."""


def confidence_class(confidence: float) -> int:
    """Class of a draft by its probability; classes are narrower at the upper end, where most drafts are."""
    if not confidence > 0:  # nor a number
        return 0
    return min(CONFIDENCE_CLASSES - 1, int(confidence * confidence * CONFIDENCE_CLASSES))


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When to stop drafting before the full length."""

    rates: tuple[float, ...]
    """Acceptance rate of a draft, by class of its confidence."""
    least: float
    """Drafting ends once the probability that all drafts of a row are accepted, on average, is below this."""

    def ends(self, confidences: Sequence[Sequence[float]]) -> bool:
        """Whether drafting ends after drafts with these probabilities, given by row."""
        chances = [math.prod(self.rates[confidence_class(x)] for x in row) for row in confidences]
        return sum(chances) < self.least * len(chances)


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """What the first layers are asked to draft."""

    exit_layer: int
    """E, layers to run; 0: no drafts."""
    num_drafts: int
    """K, tokens to draft in each row at most."""
    planned: int = 0
    """Drafts of a round that is compiled for a fixed number, K or more: rows ignore those that they can't use."""
    stop: StopRule | None = None
    """When to draft fewer."""
    draw: Draw | None = None
    """How to choose tokens; the most likely ones if not given."""


@dataclass(kw_only=True)
class Drafts:
    """Drafts that are to be verified."""

    tokens: Tensor
    """[B, K] token ids, on the device."""
    exit_layer: int = 0
    """E, layers that have run over the drafts; 0: verification begins with the embedding."""
    hidden: Tensor | None = None
    """[B, K + 1, D], outputs of layer E - 1 for the token before the drafts and for the drafts; None where E is 0."""
    confidences: Sequence[Sequence[float]] = ()
    """B x K probabilities of the drafts, where a `StopRule` asked for them."""
    exit_states: dict[int, Tensor] = field(default_factory=dict)
    """[B, K + 1, D] by exit: outputs of shallower exits, where they were asked for."""
    probs: list[Tensor] = field(default_factory=list)
    """K x [B, V] distributions that the drafts were drawn from, where acceptance needs them."""


@dataclass(kw_only=True)
class RoundTokens:
    """Tokens of a whole round, on the host."""

    drafts: list[list[int]]
    """B x K, those of the exit."""
    targets: list[list[int]]
    """B x (K + 1), those of the last layer after the pending token and after each draft."""
    confidences: Sequence[Sequence[float]] = ()
    """B x K probabilities of the drafts, where a `StopRule` asked for them."""
    seconds_drafting: float = 0.0
    seconds_verifying: float = 0.0
