"""Seconds that rounds will take: measured costs, corrected by what rounds really took."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.policy import Drafter

TIMED_ROUNDS = 9
"""Latest rounds of a drafter whose median corrects its costs."""


@dataclass(kw_only=True)
class RoundTimes:
    """Predicted seconds of a batch's rounds, on one machine."""

    costs: Costs
    ratios: dict[Drafter, deque[float]] = field(default_factory=dict)
    """Seconds that the latest rounds took over those that their costs say."""

    def __post_init__(self) -> None:
        lengths = range(self.costs.most_drafts + 1)
        self._uncorrected = [[self.costs.round(exit_, n) for n in lengths] for exit_ in range(self.costs.num_layers)]

    def seconds(self, drafter: Drafter, exit_layer: int = 0, num_drafts: int = 0) -> float:
        """Predicted seconds of a round."""
        return self._uncorrected[exit_layer][num_drafts] * self.correction(drafter)

    def of_lengths(self, drafter: Drafter, exit_layer: int) -> list[float]:
        """Predicted seconds of rounds with 0, 1, ... drafts."""
        correction = self.correction(drafter)
        return [correction * seconds for seconds in self._uncorrected[exit_layer]]

    def correction(self, drafter: Drafter) -> float:
        """Seconds that its rounds take over those that their costs say; as steps do where none was timed yet."""
        ratios = self.ratios.get(drafter) or self.ratios.get("none")
        return median(ratios) if ratios else 1.0

    def timed(self, drafter: Drafter) -> int:
        """Rounds that were timed, of the latest."""
        return len(self.ratios.get(drafter, ()))

    def observe(self, drafter: Drafter, exit_layer: int, num_drafts: int, seconds: float) -> None:
        """Learn from a round."""
        ratios = self.ratios.setdefault(drafter, deque(maxlen=TIMED_ROUNDS))
        ratios.append(seconds / self._uncorrected[exit_layer][num_drafts])
