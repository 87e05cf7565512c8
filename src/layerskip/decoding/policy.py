"""What a round does, and who decides it: a fixed plan, or one that adapts (`adaptive.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from layerskip.decoding.ngram import Match
from layerskip.model.drafts import DraftStop

Drafter = Literal["none", "early_exit", "ngram"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one round does."""

    drafter: Drafter
    exit_layer: int = 0
    num_speculations: int = 0
    tokens_per_second: float = 0.0
    """What it promises for each row."""
    stop: DraftStop | None = None
    """When to draft less."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a plan."""

    seconds: float
    """Of the whole round, planning included."""
    held: Sequence[int]
    """Drafts of each row that were accepted."""
    drafted: Sequence[int]
    """Drafts of each row."""
    tokens: Sequence[Sequence[int]]
    """What each row gained."""
    typical: bool = True
    """Whether the same round would take as long again: not so where it wasn't compiled yet, or was on the way."""
    confidences: Sequence[Sequence[float]] = ()
    agreement: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    """Of a probe: by exit, tokens on which it agreed with the target, and tokens there were."""


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

    def rests(self) -> int:
        """Steps without drafts to take now, before the next plan."""
        ...

    def observe_rest(self, seconds: Sequence[float]) -> None:
        """Learn from such steps: the seconds of each."""
        ...

    def plan(self, matches: Sequence[Match | None], remaining: int) -> Plan:
        """The next round.

        Args:
            matches: In each row, what followed the text's end where it occurred before; empty unless `uses_ngrams`.
            remaining: Tokens that the row with the most room may still write.
        """
        ...

    def observe(self, plan: Plan, matches: Sequence[Match | None], outcome: Outcome) -> None:
        """Learn from a round, given what `plan` was given and gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedPolicy:
    """The same plan for every round; where the text offers no match, n-gram rounds are steps without drafts."""

    fixed: Plan
    exits: tuple[int, ...] = ()
    probes: bool = False

    @property
    def uses_ngrams(self) -> bool:
        """Whether drafts come from the text."""
        return self.fixed.drafter == "ngram"

    def rests(self) -> int:
        """Never: plans cost nothing."""
        return 0

    def observe_rest(self, seconds: Sequence[float]) -> None:
        """There is none."""

    def plan(self, matches: Sequence[Match | None], remaining: int) -> Plan:
        """The plan."""
        return Plan(drafter="none") if self.uses_ngrams and not any(matches) else self.fixed

    def observe(self, plan: Plan, matches: Sequence[Match | None], outcome: Outcome) -> None:
        """Nothing to learn."""
