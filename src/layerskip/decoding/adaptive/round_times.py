"""Predicted seconds of rounds: measured costs, corrected by the seconds that rounds really took.

A machine that others use as well is faster in one second than in the next, by more than drafting gains. What is
compared are therefore rounds of two kinds that ran right after each other; between such comparisons, rounds say only
how fast the machine is at present, for all kinds alike.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.policy import DraftSource

TIMED_ROUNDS = 9
"""The median of this many latest rounds of one kind corrects its costs."""
COMPARED_ROUNDS, COMPARED_STEPS = 9, 2
"""Rounds, or runs of plain steps, after a change of the source that are compared with the rounds before it."""
KNOWN_ROUNDS = 3
"""Rounds by which the costs of a number of drafts count as known; before, all rounds with the same source say more."""
PRESENT_ROUNDS = 5
"""Latest rounds that say how fast the machine is at present."""


@dataclass(kw_only=True)
class RoundTimes:
    """Predicted seconds of rounds of one batch size, on one machine."""

    costs: Costs
    context: float = 0.0
    """Tokens of all rows that attention reads at present."""

    def __post_init__(self) -> None:
        self.learn(self.costs)

    def learn(self, costs: Costs) -> None:
        """Take other costs, which no round has corrected yet."""
        self.costs = costs
        self._by_source: dict[DraftSource, deque[float]] = {}
        """Ratios of measured to predicted seconds, at the machine's speed at the time."""
        self._by_length: dict[tuple[DraftSource, int], deque[float]] = {}
        """The same by source and number of drafts."""
        self._factors: dict[tuple[DraftSource, int], float] = {}
        """Medians of these, where enough is known."""
        self._latest: DraftSource | None = None
        self._left = 0
        """Rounds that are still to be compared with those before them."""
        self._present: deque[float] = deque(maxlen=PRESENT_ROUNDS)
        self._slowness = 1.0
        """How slow the machine is at present; while rounds are compared, it is taken to be what it was before them."""
        lengths = range(self.costs.most_drafts + 1)
        self._uncorrected = [[self.costs.round(exit_, n) for n in lengths] for exit_ in range(self.costs.num_layers)]

    def seconds(
        self,
        source: DraftSource,
        exit_layer: int = 0,
        num_drafts: float = 0,
        drawn: float | None = None,
        most: float = 0,
    ) -> float:
        """Predicted seconds of a round; arguments as for `Costs.round`."""
        return self._predicted(exit_layer, num_drafts, drawn, most) * self.correction(source, num_drafts)

    def of_lengths(self, source: DraftSource, exit_layer: int) -> list[float]:
        """Predicted seconds of rounds with 0, 1, ... drafts."""
        common, known, slowness = self.correction(source), self._factors, self._slowness
        return [
            (uncorrected + self._attention(exit_layer, drafts))
            * (slowness * known[source, drafts] if (source, drafts) in known else common)
            for drafts, uncorrected in enumerate(self._uncorrected[exit_layer])
        ]

    def of_rows(self, source: DraftSource, exit_layer: int, num_rows: int) -> Callable[[int, int], float]:
        """What rounds of several rows take, by the drafts of all rows together and those of the row that has most."""
        known = self.of_lengths(source, exit_layer)
        if not self.costs.ragged or num_rows == 1:
            return lambda _, longest: known[longest]

        def seconds(total: int, _: int) -> float:
            below, more = divmod(total, num_rows)
            return known[below] + (more * (known[below + 1] - known[below]) / num_rows if more else 0.0)

        return seconds

    def _predicted(self, exit_layer: int, num_drafts: float, drawn: float | None, most: float) -> float:
        """By the costs alone."""
        if drawn is None and num_drafts == int(num_drafts):
            seconds = self._uncorrected[exit_layer][int(num_drafts)]
        else:
            seconds = self.costs.round(exit_layer, num_drafts, drawn=drawn, most=most)
        return seconds + self._attention(exit_layer, max(most, num_drafts if drawn is None else drawn))

    def _attention(self, exit_layer: int, passes: float) -> float:
        """Seconds that reading the cache takes, by all layers once and by those that draft in each of their passes."""
        share = passes * exit_layer / self.costs.num_layers if exit_layer else 0.0
        return self.costs.attention * self.context * (1 + share)

    def correction(self, source: DraftSource, num_drafts: float | None = None) -> float:
        """Ratio of measured to predicted seconds of rounds with this source, and this many drafts if they were timed.

        A number of drafts that is a mean of several rounds lies between two that were timed, and so does its ratio: if
        it were that of the nearer one, a small difference in drafts would seem to make a large one in seconds. Where
        none was timed yet, it is that of steps, or else of what was timed: costs may be wrong by a factor.
        """
        if num_drafts is None:
            return self._slowness * self._factor(source, None)
        below = int(num_drafts)
        share, factor = num_drafts - below, self._factor(source, below)
        if share:
            factor += share * (self._factor(source, below + 1) - factor)
        return self._slowness * factor

    def timed(self, source: DraftSource) -> int:
        """Number of the latest rounds that were timed."""
        return len(self._by_source.get(source, ()))

    def observe(
        self,
        source: DraftSource,
        exit_layer: int,
        num_drafts: float,
        seconds: float,
        *,
        drawn: float | None = None,
        most: float = 0,
    ) -> None:
        """Learn from a round; the other arguments are as for `Costs.round`."""
        ratio = seconds / self._predicted(exit_layer, num_drafts, drawn, most)
        length = source, round(num_drafts)
        if self._latest is None:
            self._slowness = ratio
        if source != self._latest:
            self._latest, self._left = source, COMPARED_STEPS if source == "none" else COMPARED_ROUNDS
            self._present.extend([self._slowness] * PRESENT_ROUNDS)
        for ratios in (
            self._by_source.setdefault(source, deque(maxlen=TIMED_ROUNDS)),
            same := self._by_length.setdefault(length, deque(maxlen=TIMED_ROUNDS)),
        ):
            ratios.append(ratio / self._slowness)
        if len(same) >= KNOWN_ROUNDS:
            self._factors[length] = median(same)
        if self._left:
            self._left -= 1
        else:
            self._present.append(ratio / self._factor(*length))
            self._slowness = median(self._present)

    def _factor(self, source: DraftSource, num_drafts: int | None) -> float:
        if num_drafts is not None and (source, num_drafts) in self._factors:
            return self._factors[source, num_drafts]
        timed = self._by_source
        ratios = timed.get(source) or timed.get("none") or next(iter(timed.values()), None)
        return median(ratios) if ratios else 1.0
