"""How often drafts hold: tracked while decoding, for every exit, depth and confidence, and for matches in the text.

Each rate has a long memory, which later texts start from, and a recent one of the present text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from layerskip.model.drafts import CONFIDENCE_CLASSES, confidence_class

RECENT_DECAY, LONG_DECAY = 0.97, 0.998
"""What an observation weighs after the next one."""
LONG_WEIGHT = 12.0
"""Observations of the present text that the long memory stands for."""
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0
PART_WEIGHT = 4.0
"""Observations that an exit's overall rate counts as for its depths and confidence classes."""


@dataclass(kw_only=True)
class Count:
    """Drafts that held, of those tried; older ones weigh less."""

    decay: float
    held: float = 0.0
    tried: float = 0.0

    def observe(self, held: float, tried: float) -> None:
        """Count drafts."""
        kept = self.decay**tried
        self.held = kept * self.held + held
        self.tried = kept * self.tried + tried


@dataclass(kw_only=True)
class Rate:
    """Probability that the next draft is accepted."""

    recent: Count = field(default_factory=lambda: Count(decay=RECENT_DECAY))
    long: Count = field(default_factory=lambda: Count(decay=LONG_DECAY))

    @property
    def value(self) -> float:
        """The present text's, with the long memory's where little was seen of it."""
        prior = (self.long.held + PRIOR_WEIGHT * PRIOR_RATE) / (self.long.tried + PRIOR_WEIGHT)
        weight = min(LONG_WEIGHT, self.long.tried + PRIOR_WEIGHT)
        return (self.recent.held + weight * prior) / (self.recent.tried + weight)

    def observe(self, held: float, tried: float) -> None:
        """Count drafts that were tried, of which some held."""
        if tried > 0:
            self.recent.observe(held, tried)
            self.long.observe(held, tried)

    def within(self, overall: float) -> float:
        """This part's rate, from the overall one where little was seen of the part."""
        return (self.long.held + PART_WEIGHT * overall) / (self.long.tried + PART_WEIGHT)

    def begin_text(self) -> None:
        """Forget the present text."""
        self.recent = Count(decay=RECENT_DECAY)


@dataclass(kw_only=True)
class ExitRates:
    """Acceptance of one exit's drafts."""

    overall: Rate = field(default_factory=Rate)
    depths: list[Rate] = field(default_factory=list)
    """Of the first, second, ... draft of a round, given that those before it held."""
    classes: list[Rate] = field(default_factory=lambda: [Rate() for _ in range(CONFIDENCE_CLASSES)])
    """By confidence."""

    def observe(self, held: int, drafted: int, confidences: Sequence[float]) -> None:
        """Learn from a round's drafts, up to the first that was rejected."""
        tried = min(held + 1, drafted)
        self.overall.observe(held, tried)
        self.depths += [Rate() for _ in range(tried - len(self.depths))]
        for depth in range(tried):
            self.depths[depth].observe(depth < held, 1)
            if confidences:
                self.classes[confidence_class(confidences[depth])].observe(depth < held, 1)

    def chances(self, most: int) -> Iterator[float]:
        """Probability that the first 1, 2, ... `most` drafts of a round all hold."""
        overall, chance = self.overall.value, 1.0
        for depth in range(most):
            chance *= self.depths[depth].within(overall) if depth < len(self.depths) else overall
            yield chance

    def by_confidence(self) -> tuple[float, ...]:
        """Acceptance of a draft by its class of confidence."""
        overall = self.overall.value
        return tuple(rate.within(overall) for rate in self.classes)


@dataclass(kw_only=True)
class AcceptanceRates:
    """All that was learned about one model's drafts."""

    exits: dict[int, ExitRates] = field(default_factory=dict)
    matches: dict[int, Rate] = field(default_factory=dict)
    """Of n-gram drafts, by the class of their match's length."""

    def of_exit(self, exit_layer: int) -> ExitRates:
        """Rates of an exit."""
        if exit_layer not in self.exits:
            self.exits[exit_layer] = ExitRates()
        return self.exits[exit_layer]

    def of_match(self, length: int) -> Rate:
        """Rate of drafts that follow a match of so many tokens."""
        length_class = min(length, 16).bit_length()
        if length_class not in self.matches:
            self.matches[length_class] = Rate()
        return self.matches[length_class]

    def observe_exits(self, agreement: Mapping[int, tuple[float, int]]) -> None:
        """Learn from a probe: of each exit, tokens on which it agreed with the target, and tokens there were."""
        for exit_layer, (agreed, tokens) in agreement.items():
            self.of_exit(exit_layer).overall.observe(agreed, tokens)

    def begin_text(self) -> None:
        """The next observations are of another text."""
        for rates in self.exits.values():
            rates.overall.begin_text()
        for rate in self.matches.values():
            rate.begin_text()
