"""Who drafts in a round, at which exit, and how many tokens: what promises the most tokens a second.

Costs are measured (`costs.py`) and corrected by the seconds that rounds really take; acceptance is tracked
(`acceptance.py`), also for exits that aren't used: every so often a round keeps the hidden states that it passes
anyway, and the head says what each exit would have drafted. Where no drafting promises a gain, the round is an
autoregressive step. Source: arXiv:2504.05598 (exit and length chosen each round from the agreement seen so far).
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Literal, Protocol

from layerskip.decoding.acceptance import AcceptanceRates
from layerskip.decoding.costs import Costs
from layerskip.decoding.ngram import Match
from layerskip.model.drafts import DraftStop

Drafter = Literal["none", "early_exit", "ngram"]
MOST_DRAFTS = 12
MARGIN = 1.02
"""Gain that drafting must promise: less is within the error of the costs."""
PLAN_EVERY = 4
"""Rounds that keep an exit and a length: rates don't move faster."""
FIRST_PROBES = 3
"""Rounds that look at all exits, at the start of the first text."""
PROBE_SHARE = 0.015
"""Time that probes may take, of all."""
TIMED_ROUNDS = 9
"""Latest rounds of a drafter whose median corrects its costs."""
FIRST_STEPS, STEP_EVERY = 3, 48
"""Rounds without drafts that are timed at first, and rounds from one to the next: what drafting is held against."""


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
    held: Sequence[int]
    """Drafts of each row that were accepted."""
    drafted: Sequence[int]
    """Drafts of each row."""
    tokens: Sequence[Sequence[int]]
    """What each row gained."""
    confidences: Sequence[Sequence[float]] = ()
    agreement: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    """Of a probe: by exit, tokens on which it agreed with the target, and tokens there were."""


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
    """The same plan for every round."""

    fixed: Plan
    exits: tuple[int, ...] = ()
    uses_ngrams: bool = False
    probes: bool = False

    def plan(self, matches: Sequence[Match | None], remaining: int) -> Plan:
        """The plan."""
        return self.fixed

    def observe(self, plan: Plan, matches: Sequence[Match | None], outcome: Outcome) -> None:
        """Nothing to learn."""


@dataclass(kw_only=True)
class AdaptivePolicy:
    """The plan that promises the most, from what was seen so far."""

    costs: Costs
    exits: tuple[int, ...]
    rates: AcceptanceRates = field(default_factory=AcceptanceRates)
    ratios: dict[Drafter, deque[float]] = field(default_factory=dict)
    """Seconds that the latest rounds took over those that their costs say."""
    most_drafts: int = MOST_DRAFTS
    stops_early: bool = True
    """Whether drafting may end when drafts become doubtful. On a GPU, asking costs more than it gives."""
    uses_ngrams: bool = True
    counts: Counter[tuple[Drafter, int]] = field(default_factory=Counter)
    """Rounds by drafter and exit."""

    def __post_init__(self) -> None:
        self.most_drafts = min(self.most_drafts, self.costs.most_drafts)
        self._early: Plan | None = None
        self._since_probe = self._probe_seconds = 0.0
        self.rates.begin_text()

    @property
    def probes(self) -> bool:
        """At first, and whenever probes have taken no more than their share of the time."""
        if not self.exits:
            return False
        seen = min(self.rates.of_exit(exit_layer).overall.long.tried for exit_layer in self.exits)
        rounds = sum(self.counts.values())
        if seen < 2 * FIRST_PROBES and rounds < FIRST_PROBES:
            return True
        return self._since_probe * PROBE_SHARE > max(self._probe_seconds, self.costs.step() / 4)

    def plan(self, matches: Sequence[Match | None], remaining: int) -> Plan:
        """The round that promises the most."""
        if self._early is None or sum(self.counts.values()) % PLAN_EVERY == 0:
            self._early = self._best_early(max(1, min(self.most_drafts, remaining - 1)))
        if remaining <= 1 or self._times_a_step():
            return Plan(drafter="none")
        return self._better_ngram(self._early, matches, min(self.most_drafts, remaining - 1))

    def observe(self, plan: Plan, matches: Sequence[Match | None], outcome: Outcome) -> None:
        """Learn from a round."""
        self.counts[plan.drafter, plan.exit_layer] += 1
        if plan.drafter == "early_exit":
            rates = self.rates.of_exit(plan.exit_layer)
            for row, (held, drafted) in enumerate(zip(outcome.held, outcome.drafted, strict=True)):
                rates.observe(held, drafted, outcome.confidences[row] if outcome.confidences else ())
        for match, tokens in zip(matches, outcome.tokens, strict=False):
            if match is not None:  # also where it wasn't used
                held = match.agreement(tokens)
                self.rates.of_match(match.length).observe(held, min(held + 1, len(tokens)))
        drafted = max(outcome.drafted, default=0)
        if outcome.agreement:
            predicted = self._seconds(plan.drafter, plan.exit_layer, drafted)
            self._probe_seconds = max(0.0, outcome.seconds - predicted)
            self._since_probe = 0.0
            others = {exit_: seen for exit_, seen in outcome.agreement.items() if exit_ != plan.exit_layer}
            self.rates.observe_exits(others)
        else:
            self._since_probe += outcome.seconds
            costs = self._uncorrected(plan.drafter, plan.exit_layer, drafted)
            self.ratios.setdefault(plan.drafter, deque(maxlen=TIMED_ROUNDS)).append(outcome.seconds / costs)

    def seconds(self, plan: Plan) -> float:
        """Predicted seconds of a round."""
        return self._seconds(plan.drafter, plan.exit_layer, plan.num_speculations)

    def correction(self, drafter: Drafter) -> float:
        """Seconds that its rounds take over those that their costs say."""
        ratios = self.ratios.get(drafter)
        return median(ratios) if ratios else 1.0

    def _seconds(self, drafter: Drafter, exit_layer: int, num_drafts: int) -> float:
        return self._uncorrected(drafter, exit_layer, num_drafts) * self.correction(drafter)

    def _uncorrected(self, drafter: Drafter, exit_layer: int, num_drafts: int) -> float:
        return self.costs.step() if drafter == "none" else self.costs.round(exit_layer, num_drafts)

    def _times_a_step(self) -> bool:
        """Whether the next round should be one without drafts, to know what drafting is held against."""
        rounds = sum(self.counts.values())
        timed = len(self.ratios.get("none", ()))
        return rounds > FIRST_PROBES and (timed < FIRST_STEPS or rounds % STEP_EVERY == 0)

    def _best_early(self, most: int) -> Plan:
        """The best exit and length, or an autoregressive step."""
        best = Plan(drafter="none", tokens_per_second=MARGIN / self._seconds("none", 0, 0))
        chances: list[float] = []
        correction = self.correction("early_exit")
        for exit_layer in self.exits:
            found = self.rates.of_exit(exit_layer).chances(most)
            for drafts, tokens in enumerate(accumulate(found, initial=1.0)):
                seconds = correction * self._uncorrected("early_exit", exit_layer, drafts)
                speed = tokens / seconds if drafts else 0.0
                if speed > best.tokens_per_second:
                    best = Plan(
                        drafter="early_exit", exit_layer=exit_layer, num_speculations=drafts, tokens_per_second=speed
                    )
                    chances = found
        return self._with_stop(best, most) if chances and self.stops_early else best

    def _with_stop(self, plan: Plan, most: int) -> Plan:
        """The same exit with as many drafts as are likely to hold: another one must gain more time than it takes."""
        rates = self.rates.of_exit(plan.exit_layer)
        slope = self._seconds("early_exit", plan.exit_layer, most) - self._seconds("early_exit", plan.exit_layer, 1)
        worth = slope / max(1, most - 1) * plan.tokens_per_second  # tokens that the time of another draft is worth
        stop = DraftStop(rates=rates.by_confidence(), least=worth / max(0.05, rates.overall.value))
        return Plan(
            drafter="early_exit",
            exit_layer=plan.exit_layer,
            num_speculations=most,
            tokens_per_second=plan.tokens_per_second,
            stop=stop,
        )

    def _better_ngram(self, best: Plan, matches: Sequence[Match | None], most: int) -> Plan:
        if not any(matches):
            return best
        rates = [self.rates.of_match(match.length).value if match is not None else 0.0 for match in matches]
        tokens, chances = float(len(rates)), [1.0] * len(rates)
        for drafts in range(1, most + 1):
            chances = [chance * rate for chance, rate in zip(chances, rates, strict=True)]
            tokens += sum(chances)
            speed = tokens / len(rates) / self._seconds("ngram", 0, drafts)
            if speed > best.tokens_per_second:
                best = Plan(drafter="ngram", num_speculations=drafts, tokens_per_second=speed)
        return best
