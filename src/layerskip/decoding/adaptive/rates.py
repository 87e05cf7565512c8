"""Acceptance rates of drafts, tracked while decoding: by exit, depth and confidence, and by the length of a match.

Each rate has a long memory, which later sequences start from, and a recent one of the rows that run at present.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from layerskip.model.drafts import CONFIDENCE_CLASSES, confidence_class

RECENT_DECAY, LONG_DECAY = 0.97, 0.998
"""Decay factors: the weight that an observation keeps each time a new one arrives."""
LONG_WEIGHT = 12.0
"""Observations: the long-term rate counts as this many observations of the rows that run at present."""
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0
"""The rate that is assumed before anything is observed, and the observations that it counts as."""
SHARE_WEIGHT = 0.25
"""Drafts of each class that are assumed to have been drawn before any was."""
PART_WEIGHT = 4.0
"""Observations: how strongly rates by depth and by confidence are pulled towards the exit's overall rate."""
ENOUGH_TOKENS = 6
"""Tokens by which the acceptance of an exit, or of what follows a match, counts as known."""


@dataclass(kw_only=True)
class Count:
    """Accepted drafts, of those that were tried; older ones weigh less."""

    decay: float
    accepted: float = 0.0
    tried: float = 0.0

    def observe(self, accepted: float, tried: float) -> None:
        """Count drafts."""
        kept = self.decay**tried
        self.accepted = kept * self.accepted + accepted
        self.tried = kept * self.tried + tried


@dataclass(kw_only=True)
class Rate:
    """Probability that the next draft is accepted."""

    assumed: float = PRIOR_RATE
    """The rate before anything is observed."""
    recent: Count = field(default_factory=lambda: Count(decay=RECENT_DECAY))
    long: Count = field(default_factory=lambda: Count(decay=LONG_DECAY))

    @property
    def value(self) -> float:
        """The recent rate, completed by the long-term one where little has been observed recently."""
        prior = (self.long.accepted + PRIOR_WEIGHT * self.assumed) / (self.long.tried + PRIOR_WEIGHT)
        weight = min(LONG_WEIGHT, self.long.tried + PRIOR_WEIGHT)
        return (self.recent.accepted + weight * prior) / (self.recent.tried + weight)

    def observe(self, accepted: float, tried: float) -> None:
        """Count drafts that were tried, of which some were accepted."""
        if tried > 0:
            self.recent.observe(accepted, tried)
            self.long.observe(accepted, tried)

    def within(self, overall: float) -> float:
        """The rate of a part, completed by the overall one where little has been observed of the part."""
        return (self.long.accepted + PART_WEIGHT * overall) / (self.long.tried + PART_WEIGHT)

    def forget_recent(self) -> None:
        """Other rows run from here on."""
        self.recent = Count(decay=RECENT_DECAY)


@dataclass(kw_only=True)
class ExitRates:
    """Acceptance of one exit's drafts."""

    overall: Rate = field(default_factory=Rate)
    depths: list[Rate] = field(default_factory=list)
    """Of the first, second, ... draft of a round, given that those before it were accepted."""
    classes: list[Rate] = field(default_factory=lambda: [Rate() for _ in range(CONFIDENCE_CLASSES)])
    """By confidence."""
    drawn: list[float] = field(default_factory=lambda: [0.0] * CONFIDENCE_CLASSES)
    """Drafts of each class that were drawn, also those that weren't verified; older ones weigh less."""

    def observe(self, accepted: int, drafted: int, confidences: Sequence[float]) -> None:
        """Learn from a row's drafts, up to the first that was rejected."""
        tried = min(accepted + 1, drafted)
        for confidence in confidences[: accepted + 1]:  # what follows a rejected draft is another text
            self._draw(confidence_class(confidence), 1.0)
        self.overall.observe(accepted, tried)
        self.depths += [Rate() for _ in range(tried - len(self.depths))]
        for depth in range(tried):
            self.depths[depth].observe(depth < accepted, 1)
            if confidences:
                self.classes[confidence_class(confidences[depth])].observe(depth < accepted, 1)

    def assume(self, seen: Sequence[tuple[float, float]], weight: float) -> None:
        """Begin with what was measured elsewhere.

        Args:
            seen: Tokens on which the exit agreed with the target, and all, by class of confidence.
            weight: Tokens that they count as, together.
        """
        total = sum(tokens for _, tokens in seen)
        if not total:
            return
        for place, (rate, (agreed, tokens)) in enumerate(zip(self.classes, seen, strict=True)):
            rate.observe(agreed * weight / total, tokens * weight / total)
            self._draw(place, tokens * weight / total)
        self.overall.observe(weight * sum(agreed for agreed, _ in seen) / total, weight)

    def chances(self, most: int) -> Iterator[float]:
        """Probability that the first 1, 2, ... `most` drafts of a round are all accepted."""
        overall, chance = self.overall.value, 1.0
        for depth in range(most):
            chance *= self.depths[depth].within(overall) if depth < len(self.depths) else overall
            yield chance

    def shares(self) -> tuple[float, ...]:
        """Share of all drafts that each class of confidence has; equal ones before anything is known."""
        known = sum(self.drawn) + CONFIDENCE_CLASSES * SHARE_WEIGHT
        return tuple((number + SHARE_WEIGHT) / known for number in self.drawn)

    def _draw(self, place: int, weight: float) -> None:
        kept = LONG_DECAY**weight
        self.drawn = [kept * number for number in self.drawn]
        self.drawn[place] += weight

    def by_confidence(self) -> tuple[float, ...]:
        """Acceptance rate of a draft by its class of confidence."""
        overall = self.overall.value
        return tuple(rate.within(overall) for rate in self.classes)


@dataclass(kw_only=True)
class AcceptanceRates:
    """Everything learned about the drafts of one model, for rows that sample or for rows that don't."""

    prior: float = PRIOR_RATE
    """The rate of an exit before anything is observed."""
    exits: dict[int, ExitRates] = field(default_factory=dict)
    matches: dict[tuple[bool, int, bool], Rate] = field(default_factory=dict)
    """Of drafts from texts: whether that is another request's, the class of their match's length, and whether others
    precede them in the round."""

    def of_exit(self, exit_layer: int) -> ExitRates:
        """Rates of an exit."""
        if exit_layer not in self.exits:
            self.exits[exit_layer] = ExitRates(overall=Rate(assumed=self.prior))
        return self.exits[exit_layer]

    def of_match(self, length: int, *, foreign: bool = False, further: bool = False) -> Rate:
        """Rate of drafts that follow a match.

        Texts that have nothing in common must not spoil the rate of those that repeat; and plain steps tell of the
        first drafts only, which hold more often.

        Args:
            length: Tokens of the match.
            foreign: Whether they occurred in another request's text.
            further: Of drafts behind the first of a round.
        """
        kind = foreign, min(length, 16).bit_length(), further
        if kind not in self.matches:
            self.matches[kind] = Rate()
        return self.matches[kind]

    def observe_match(self, length: int, accepted: int, tried: int, *, foreign: bool = False) -> None:
        """Learn from the tokens that came after a match: those that followed it before, and all that were compared."""
        self.of_match(length, foreign=foreign).observe(min(accepted, 1), min(tried, 1))
        further = self.of_match(length, foreign=foreign, further=True)
        further.observe(max(0, accepted - 1), max(0, tried - 1))

    def match_chances(self, length: int, most: int, *, foreign: bool = False) -> list[float]:
        """Probability that the first 1, 2, ... `most` drafts that follow a match are all accepted."""
        first = self.of_match(length, foreign=foreign).value
        further = self.of_match(length, foreign=foreign, further=True).value
        return [first * further**drafts for drafts in range(most)]

    def observe_exits(self, agreement: Mapping[int, tuple[float, float]]) -> None:
        """Learn from a probe: by exit, tokens on which it agreed with the target, and tokens that were compared."""
        for exit_layer, (agreed, tokens) in agreement.items():
            self.of_exit(exit_layer).overall.observe(agreed, tokens)

    def forget_recent(self) -> bool:
        """Other rows run from here on; whether anything was known of exits that is forgotten."""
        known = any(rates.overall.recent.tried for rates in self.exits.values())
        for rates in self.exits.values():
            rates.overall.forget_recent()
        for rate in self.matches.values():
            rate.forget_recent()
        return known
