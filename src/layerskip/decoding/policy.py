"""What a round does, and who decides it: a fixed plan, or one that adapts (`adaptive/policy.py`)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.model.drafts import StopRule

DraftSource = Literal["none", "layers", "text"]
"""Where drafts come from: nowhere, the first layers, or the sequence itself."""
DrafterName = Literal["early_exit", "exit_adapter", "ngram", "grammar"]
"""What drafted, by its name in statistics and events: norm and head at a bare exit, an exit's adapter, the text, or a
constraint that left no choice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one round does, or several steps without drafts."""

    source: DraftSource
    exit_layer: int = 0
    num_speculations: int = 0
    """Most drafts of a row."""
    lengths: tuple[int, ...] = ()
    """Drafts of each row at most, none above `num_speculations`, which is all rows' number if not given."""
    tokens_per_second: float = 0.0
    """Expected tokens/s of each row."""
    stop: StopRule | None = None
    """When to draft fewer."""
    probe: tuple[int, ...] = ()
    """Exits whose agreement with the target the round measures."""
    steps: int = 0
    """Steps without drafts to take before the policy is asked again; 0: rounds, each of which is observed."""
    lease: int = 1
    """Rounds, at most, that may be run by it before the policy is asked again."""
    until_repeated: int = 0
    """Ask again, too, once this many last tokens of a row have occurred before: the text might draft from there on.
    0: don't."""

    def drafter(self, adapted_exits: Collection[int]) -> DrafterName | None:
        """What drafts by this plan, in a network with these adapters; None where nothing does."""
        match self.source:
            case "text":
                return "ngram"
            case "layers":
                return "exit_adapter" if self.exit_layer in adapted_exits else "early_exit"
            case _:
                return None


UNLIMITED = 1 << 30
"""A lease of rounds that nobody plans otherwise."""
STEPS = Plan(source="none", steps=UNLIMITED)
"""Plain decoding: one step after the other."""


@dataclass(kw_only=True)
class RoundResult:
    """What a plan gave."""

    drafts: Sequence[tuple[int, ...]]
    """Drafts of each row."""
    num_accepted: Sequence[int]
    """Drafts of each row that were accepted."""
    tokens: Sequence[int]
    """The target's token after them."""
    confidences: Sequence[Sequence[float]] = ()
    """Probabilities of each row's drafts, where the plan had a `StopRule`; also of a last one that was given up."""
    agreement: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    """Of a probe: by exit, tokens on which it agreed with the target, and tokens that were compared."""
    seconds: float = 0.0
    """Of the whole round, planning included."""
    seconds_drafting: float = 0.0
    seconds_verifying: float = 0.0
    settled: bool = True
    """Whether the same round would take as long again; not if it wasn't compiled yet, or was compiled meanwhile."""
    step_seconds: Sequence[float] = ()
    """Of a plan of several `steps`, seconds of each that settled; all else here is of the first."""
    certain: Sequence[Sequence[bool]] = ()
    """For each row and draft, whether a constraint left no other choice; empty if none did anywhere."""
    logprobs: Sequence[tuple[TokenLogprobs, ...]] = ()
    """Of the tokens that each row gained, for rows that ask for them; empty if none does."""

    def gained(self, row: int) -> tuple[int, ...]:
        """Tokens that a row gained: its accepted drafts, then the target's own token."""
        return (*self.drafts[row][: self.num_accepted[row]], self.tokens[row])

    def tried(self, row: int) -> tuple[int, int]:
        """Drafts of a row that were accepted, and all.

        Those that were certain say nothing of what drafted, and aren't counted.
        """
        accepted, drafts = self.num_accepted[row], len(self.drafts[row])
        if not self.certain:
            return accepted, drafts
        certain = self.certain[row]
        return accepted - sum(certain[:accepted]), drafts - sum(certain[:drafts])


class BatchView(Protocol):
    """What a policy may know of the batch that it plans for."""

    @property
    def num_rows(self) -> int:
        """Rows at this round."""
        ...

    @property
    def remaining(self) -> int:
        """Tokens that the row with the most room may still generate."""
        ...

    @property
    def samples(self) -> Sequence[bool]:
        """For each row, whether its tokens are drawn; otherwise the most likely ones are taken."""
        ...

    @property
    def by_distribution(self) -> bool:
        """Whether drafts are accepted by rejection sampling, and not by comparing tokens."""
        ...

    @property
    def context(self) -> int:
        """Tokens of all rows together."""
        ...

    @property
    def histories(self) -> Sequence[tuple[float, float]]:
        """For each row, its latest drafts by early layers: accepted ones, and all up to the first that wasn't."""
        ...

    def matches(self) -> Sequence[Match | None]:
        """For each row, what followed its last tokens where they occurred before; looked up when asked for."""
        ...


class Policy(Protocol):
    """Plans the rounds of a batch, and learns from them."""

    def prepare(self, view: BatchView) -> None:
        """Measure what planning for such a batch needs, before its rows' time begins."""
        ...

    def plan(self, view: BatchView) -> Plan:
        """The next round."""
        ...

    def observe(self, plan: Plan, result: RoundResult) -> None:
        """Learn from what the last plan gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedPolicy:
    """The same plan for every round; where no row has a match, a round that drafts from the text is a plain step."""

    fixed: Plan

    def prepare(self, view: BatchView) -> None:
        """Nothing to measure."""

    def plan(self, view: BatchView) -> Plan:
        """The plan."""
        if self.fixed.source == "text" and not any(view.matches()):
            return Plan(source="none")
        return self.fixed

    def observe(self, plan: Plan, result: RoundResult) -> None:
        """Nothing to learn."""
