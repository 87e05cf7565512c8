"""Predicted seconds of rounds: measured costs, corrected by the seconds that rounds really took."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.policy import DraftSource

TIMED_ROUNDS = 9
"""Rounds: the median of this many latest rounds with the same source of drafts corrects its costs."""


@dataclass(kw_only=True)
class RoundTimes:
    """Predicted seconds of rounds of one batch size, on one machine."""

    costs: Costs
    ratios: dict[DraftSource, deque[float]] = field(default_factory=dict)
    """Ratio of measured to predicted seconds for the latest rounds."""

    def __post_init__(self) -> None:
        self.learn(self.costs)

    def learn(self, costs: Costs) -> None:
        """Take other costs, which no round has corrected yet."""
        self.costs = costs
        self.ratios.clear()
        lengths = range(self.costs.most_drafts + 1)
        self._uncorrected = [[self.costs.round(exit_, n) for n in lengths] for exit_ in range(self.costs.num_layers)]

    def seconds(self, source: DraftSource, exit_layer: int = 0, num_drafts: int = 0) -> float:
        """Predicted seconds of a round."""
        return self._uncorrected[exit_layer][num_drafts] * self.correction(source)

    def of_lengths(self, source: DraftSource, exit_layer: int) -> list[float]:
        """Predicted seconds of rounds with 0, 1, ... drafts."""
        correction = self.correction(source)
        return [correction * seconds for seconds in self._uncorrected[exit_layer]]

    def correction(self, source: DraftSource) -> float:
        """Ratio of measured to predicted seconds of rounds with this source.

        Where none was timed yet, it is that of steps, or else of what was timed: costs may be wrong by a factor.
        """
        ratios = self.ratios.get(source) or self.ratios.get("none") or next(iter(self.ratios.values()), None)
        return median(ratios) if ratios else 1.0

    def timed(self, source: DraftSource) -> int:
        """Number of the latest rounds that were timed."""
        return len(self.ratios.get(source, ()))

    def observe(self, source: DraftSource, exit_layer: int, num_drafts: int, seconds: float) -> None:
        """Learn from a round."""
        ratios = self.ratios.setdefault(source, deque(maxlen=TIMED_ROUNDS))
        ratios.append(seconds / self._uncorrected[exit_layer][num_drafts])
