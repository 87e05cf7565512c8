"""Who drafts in a round, at which exit, and how many tokens: what promises the most tokens a second.

Costs are measured (`costs.py`); acceptance is tracked for every candidate exit, also for those that aren't used: every
so often a round keeps the hidden states that it passes anyway, and one call of the head says what each exit would
have drafted. Where no drafting promises a gain, the round is an autoregressive step.
Source: arXiv:2504.05598 (exit and length chosen each round from the agreement seen so far).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from layerskip.decoding.costs import Costs

Drafter = Literal["none", "early_exit", "ngram"]
MOST_DRAFTS = 12
PROBE_EVERY = 8
"""Rounds from one look at all exits to the next."""
DECAY = 0.97
"""What an observation weighs after the next one."""
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0
MARGIN = 1.02
"""Gain that drafting must promise: less is within the error of the costs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one round does."""

    drafter: Drafter
    exit_layer: int = 0
    num_speculations: int = 0
    tokens_per_second: float = 0.0
    """What it promises for each row."""


@dataclass(kw_only=True)
class Acceptance:
    """How often the next draft is accepted, with recent rounds counting more."""

    accepted: float = PRIOR_RATE * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        """Probability that the next draft is accepted."""
        return self.accepted / self.tried

    def observe(self, accepted: float, tried: float) -> None:
        """Count drafts that were tried, of which some held."""
        if tried > 0:
            kept = DECAY**tried
            self.accepted = kept * self.accepted + accepted
            self.tried = kept * self.tried + tried


def expected_tokens(rate: float, num_drafts: int) -> float:
    """Tokens that a round of K drafts adds, its own one included. Source: arXiv:2211.17192, eq. 1."""
    return num_drafts + 1.0 if rate >= 1 else (1 - rate ** (num_drafts + 1)) / (1 - rate)


def candidate_exits(num_layers: int) -> tuple[int, ...]:
    """Exits worth following: eighths of the depth up to the half of it, and the first layer."""
    return tuple(sorted({1, *(max(1, num_layers * i // 8) for i in range(1, 5))} - {num_layers}))


class Policy(Protocol):
    """Chooses the plan of each round of one batch, and learns from what came of it."""

    @property
    def uses_ngrams(self) -> bool:
        """Whether `plan` looks at matches."""
        ...

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits that it wants to hear of, in rounds with `probes`."""
        ...

    @property
    def probes(self) -> bool:
        """Whether the next round should show what every exit would have drafted."""
        ...

    def plan(self, match_lengths: Sequence[int], remaining: int) -> Plan:
        """The next round.

        Args:
            match_lengths: Length of the n-gram match in each row, 0 where there is none; empty unless `uses_ngrams`.
            remaining: Tokens that the row with the most room may still write.
        """
        ...

    def observe(self, plan: Plan, accepted: Sequence[tuple[int, int]], match_lengths: Sequence[int]) -> None:
        """Learn from a round.

        Args:
            plan: What it did.
            accepted: Of each row, drafts that held, and drafts there were.
            match_lengths: As they were for `plan`.
        """
        ...

    def observe_exits(self, agreement: Mapping[int, tuple[float, int]]) -> None:
        """Learn from a probe: of each exit, tokens on which it agreed with the target, and tokens there were."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedPolicy:
    """The same plan for every round."""

    fixed: Plan
    exits: tuple[int, ...] = ()
    uses_ngrams: bool = False
    probes: bool = False

    def plan(self, match_lengths: Sequence[int], remaining: int) -> Plan:
        """The plan."""
        return self.fixed

    def observe(self, plan: Plan, accepted: Sequence[tuple[int, int]], match_lengths: Sequence[int]) -> None:
        """Nothing to learn."""

    def observe_exits(self, agreement: Mapping[int, tuple[float, int]]) -> None:
        """Nothing to learn."""


@dataclass(kw_only=True)
class AdaptivePolicy:
    """Chooses the plan of each round of one batch."""

    costs: Costs
    exits: tuple[int, ...]
    most_drafts: int = MOST_DRAFTS
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    """By exit."""
    matches: dict[int, Acceptance] = field(default_factory=dict)
    """Of n-gram drafts, by the length class of their match."""
    rounds: int = 0
    uses_ngrams: bool = True

    def __post_init__(self) -> None:
        self.acceptance = {exit_layer: Acceptance() for exit_layer in self.exits}
        self.most_drafts = min(self.most_drafts, len(self.costs.layer) - 1)

    @property
    def probes(self) -> bool:
        """Whether the next round should show what every exit would have drafted."""
        return self.rounds % PROBE_EVERY == 0

    def plan(self, match_lengths: Sequence[int], remaining: int) -> Plan:
        """The round that promises the most."""
        best = Plan(drafter="none", tokens_per_second=MARGIN / self.costs.step())
        most = min(self.most_drafts, remaining - 1)
        for exit_layer, acceptance in self.acceptance.items():
            for drafts in range(1, most + 1):
                gain = expected_tokens(acceptance.rate, drafts) / self.costs.round(exit_layer, drafts)
                if gain > best.tokens_per_second:
                    best = Plan(
                        drafter="early_exit", exit_layer=exit_layer, num_speculations=drafts, tokens_per_second=gain
                    )
        return self._better_ngram(best, match_lengths, most)

    def observe(self, plan: Plan, accepted: Sequence[tuple[int, int]], match_lengths: Sequence[int]) -> None:
        """Learn from a round's drafts, up to the first that was rejected."""
        self.rounds += 1
        for (held, drafted), length in zip(accepted, match_lengths, strict=True):
            tried = min(held + 1, drafted)
            if plan.drafter == "early_exit" and plan.exit_layer in self.acceptance:
                self.acceptance[plan.exit_layer].observe(held, tried)
            elif plan.drafter == "ngram" and length:
                self._match(length).observe(held, tried)

    def observe_exits(self, agreement: Mapping[int, tuple[float, int]]) -> None:
        """Learn from a probe."""
        for exit_layer, (agreed, tokens) in agreement.items():
            self.acceptance[exit_layer].observe(agreed, tokens)

    def _match(self, length: int) -> Acceptance:
        return self.matches.setdefault(min(length, 16).bit_length(), Acceptance())

    def _better_ngram(self, best: Plan, lengths: Sequence[int], most: int) -> Plan:
        if not any(lengths):
            return best
        for drafts in range(1, most + 1):
            tokens = [expected_tokens(self._match(n).rate, drafts) if n else 1.0 for n in lengths]
            gain = sum(tokens) / len(tokens) / self.costs.round(0, drafts)
            if gain > best.tokens_per_second:
                best = Plan(drafter="ngram", num_speculations=drafts, tokens_per_second=gain)
        return best
