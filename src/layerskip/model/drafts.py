"""Inputs and outputs of drafting and of whole rounds.

Shapes: B rows, K drafts a row, D width.
"""

import math
from collections.abc import Collection, Sequence
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
    """A row's drafting ends once the probability that all of its drafts are accepted is below this."""
    kept: float = 0.0
    """A draft with which that probability falls below this is given up: it isn't verified. Only where drafts are
    compared with the target's tokens; with rejection sampling, giving up drafts by what they are changes what is
    written."""

    def chance(self, confidences: Sequence[float]) -> float:
        """The probability that drafts of a row with these confidences are all accepted."""
        return math.prod(self.rates[confidence_class(x)] for x in confidences)


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """What the first layers are asked to draft."""

    exit_layer: int
    """E, layers to run; 0: no drafts."""
    num_drafts: int
    """K, tokens to draft in each row at most."""
    lengths: tuple[int, ...] = ()
    """The same for each row, none above K; K for all if not given."""
    planned: int = 0
    """Drafts of a round that is compiled for a fixed number, K or more: rows ignore those that they can't use."""
    stop: StopRule | None = None
    """When to draft fewer."""
    draw: Draw | None = None
    """How to choose tokens; the most likely ones if not given."""

    def limits(self, num_rows: int) -> Sequence[int]:
        """Tokens to draft in each row at most."""
        return self.lengths or (self.num_drafts,) * num_rows


@dataclass(frozen=True, kw_only=True)
class Lease:
    """How far rounds may go on before somebody is asked: until a row ends, or the first of these limits."""

    remaining: Sequence[int]
    """Tokens that each row may gain."""
    ends: Sequence[Collection[int]]
    """Tokens that end each row."""
    rounds: int = 1
    seconds: float = 0.0
    """No further round begins after that."""
    texts: Sequence[Sequence[int]] = ()
    """All tokens of each row, where rounds are to end as well once the last ones of a row have occurred before."""
    repeated: int = 0
    """Number of these last tokens."""


class DraftCounts:
    """How many drafts each row has, while one after the other is drawn."""

    def __init__(self, limits: Sequence[int], stop: StopRule | None = None) -> None:
        """Begin without drafts.

        Args:
            limits: Drafts of each row at most.
            stop: When a row has fewer.
        """
        self._limits, self._stop = limits, stop
        self.counts = [0] * len(limits)
        """Drafts of each row that are worth being verified."""
        self.confidences: list[list[float]] = [[] for _ in limits]
        """Probabilities of each row's drafts, where there is a `StopRule`; also of a last one that was given up."""
        self._open = [row for row, limit in enumerate(limits) if limit > 0]

    @property
    def goes_on(self) -> bool:
        """Whether any row drafts on."""
        return bool(self._open)

    def add(self, confidences: Sequence[float] = ()) -> None:
        """Count another draft of each row that drafts on; probabilities are given for all rows."""
        still_open = []
        for row in self._open:
            least = -math.inf
            chance = 1.0
            if self._stop is not None:
                self.confidences[row].append(confidences[row])
                chance, least = self._stop.chance(self.confidences[row]), self._stop.least
                if chance < self._stop.kept:
                    continue
            self.counts[row] += 1
            if chance >= least and self.counts[row] < self._limits[row]:
                still_open.append(row)
        self._open = still_open


@dataclass(kw_only=True)
class Drafts:
    """Drafts that are to be verified."""

    tokens: Tensor
    """[B, K] token ids, on the device."""
    lengths: Sequence[int]
    """Drafts of each row; what follows them in `tokens` is padding."""
    exit_layer: int = 0
    """E, layers that have run over the drafts; 0: verification begins with the embedding."""
    hidden: Tensor | None = None
    """[B, K + 1, D], outputs of layer E - 1 for the token before the drafts and for the drafts; None where E is 0."""
    confidences: Sequence[Sequence[float]] = ()
    """Probabilities of each row's drafts, where a `StopRule` asked for them; also of a last one that was given up."""
    exit_states: dict[int, Tensor] = field(default_factory=dict)
    """[B, K + 1, D] by exit: outputs of shallower exits, where they were asked for."""
    probs: list[Tensor] = field(default_factory=list)
    """K x [B, V] distributions that the drafts were drawn from, where acceptance needs them."""


@dataclass(kw_only=True)
class RoundTokens:
    """Tokens of a whole round, on the host."""

    drafts: Sequence[Sequence[int]]
    """Each row's drafts, those of the exit."""
    targets: Sequence[Sequence[int]]
    """Those of the last layer after the pending token and after each draft; there may be padding behind them."""
    confidences: Sequence[Sequence[float]] = ()
    """As for `Drafts`."""
    seconds_drafting: float = 0.0
    seconds_verifying: float = 0.0
