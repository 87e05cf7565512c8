"""Inputs and outputs of drafting: the stop rule, the request, the drafts, and whole rounds.

Shapes: B rows, K drafts a row, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CONFIDENCE_CLASSES = 8


def confidence_class(confidence: float) -> int:
    """Class of a draft by its probability; classes are narrower at the upper end, where most drafts are."""
    if not confidence > 0:  # nor a number
        return 0
    return min(CONFIDENCE_CLASSES - 1, int(confidence * confidence * CONFIDENCE_CLASSES))


@dataclass(frozen=True, kw_only=True)
class DraftStop:
    """When to stop drafting before the full length."""

    rates: tuple[float, ...]
    """How often a draft holds, by class of its confidence."""
    least: float
    """Drafting ends once the chance that all drafts of a row hold, on average over the rows, is below this."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How tokens are drawn from logits with noise that depends on seed, position and token alone (`noise.gumbel`)."""

    temperature: float
    top_k: int
    """0: all tokens."""
    top_p: float
    """1: all tokens."""
    min_p: float
    """0: all tokens."""
    seeds: Sequence[int]
    """Of each row."""


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """What drafting in one call is to do."""

    exit_layer: int
    """E, layers to run."""
    num_drafts: int
    """K, most tokens to write in each row."""
    stop: DraftStop | None = None
    """When to write fewer."""
    draw: Draw | None = None
    """How to choose tokens; the likeliest if not given."""
    complete: bool = True
    """Run the last draft through the layers as well."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Tokens written by the first layers."""

    tokens: Tensor
    """[B, K]."""
    hidden: Tensor
    """[B, K + 1, D], outputs of the exit for the token before the drafts and for the drafts."""
    confidences: list[list[float]]
    """B x K probabilities of the drafts; empty without a `DraftStop`."""


@dataclass(frozen=True, kw_only=True)
class GreedyRound:
    """Likeliest tokens of a whole round, on the host."""

    drafts: Tensor
    """[B, K], those of the exit."""
    targets: Tensor
    """[B, K + 1], those of the last layer after the pending token and after each draft."""
