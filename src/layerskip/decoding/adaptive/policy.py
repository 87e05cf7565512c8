"""Who drafts in a round, at which exit, and how many tokens: what promises the most tokens a second.

Costs are measured (`costs.py`) and corrected by the seconds that rounds really take (`round_times.py`); acceptance is
tracked (`acceptance.py`), also for exits that aren't used: every so often a round keeps the hidden states that it
passes anyway, and the head says what each exit would have drafted. Where no drafting promises a gain, the round is an
autoregressive step, and while that goes on, planning rests. Source: arXiv:2504.05598 (exit and length chosen each round
from the agreement seen so far).
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerskip.decoding.adaptive.pace import COLD_STEPS, FIRST_REST, TIMED_STEPS, Pace
from layerskip.decoding.adaptive.rates import AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.ngram import Match
from layerskip.decoding.policy import Drafter, Outcome, Plan
from layerskip.model.drafts import DraftStop

MOST_DRAFTS = 12
MARGIN = 1.04
"""Gain that drafting must promise: less is within the error of the costs."""
PLAN_EVERY = 4
"""Rounds that keep an exit and a length: rates don't move faster."""
FIRST_PROBES = 3
"""Rounds that look at all exits, at the start of the first text."""


def candidate_exits(num_layers: int) -> tuple[int, ...]:
    """Exits worth following: eighths of the depth up to the half of it, and the first layer."""
    return tuple(sorted({1, *(max(1, num_layers * i // 8) for i in range(1, 5))} - {num_layers}))


@dataclass(kw_only=True)
class AdaptivePolicy:
    """The plan that promises the most, from what was seen so far."""

    times: RoundTimes
    exits: tuple[int, ...]
    rates: AcceptanceRates = field(default_factory=AcceptanceRates)
    pace: Pace = field(default_factory=Pace)
    most_drafts: int = MOST_DRAFTS
    stops_early: bool = True
    """Whether drafting may end when drafts become doubtful. On a GPU, asking costs more than it gives."""
    uses_ngrams: bool = True
    counts: Counter[tuple[Drafter, int]] = field(default_factory=Counter)
    """Rounds by drafter and exit."""

    def __post_init__(self) -> None:
        self.most_drafts = min(self.most_drafts, self.times.costs.most_drafts)
        self._rounds = 0
        self._early: Plan | None = None
        self._stale, self._planned_at = True, -PLAN_EVERY
        self._learning_seconds = 0.0
        self._rest = min(FIRST_REST, self.pace.rest)
        self.rates.begin_text()

    @property
    def probes(self) -> bool:
        """At first, and whenever probes have taken no more than their share of the time."""
        if not self.exits:
            return False
        if self._rounds < FIRST_PROBES:
            seen = min(self.rates.of_exit(exit_layer).overall.long.tried for exit_layer in self.exits)
            if seen < 2 * FIRST_PROBES:
                return True
        return self.pace.probe_is_due(self.times.costs.step())

    def rests(self) -> int:
        """While steps without drafts turn out best, more and more of them are taken without asking."""
        steps, self._rest = self._rest, 0
        return steps

    def observe_rest(self, seconds: Sequence[float]) -> None:
        """Time steps."""
        self._count("none", 0, len(seconds))
        step = self.pace.observe_steps(seconds)
        if step is not None:
            self.times.observe("none", 0, 0, step)

    def plan(self, matches: Sequence[Match | None], remaining: int) -> Plan:
        """The round that promises the most."""
        if remaining <= 1 or self._times_steps():
            return Plan(drafter="none")
        most = min(self.most_drafts, remaining - 1)
        if self._stale and self._rounds - self._planned_at >= PLAN_EVERY:
            self._early = self._best_early(most)
            self._stale, self._planned_at = False, self._rounds
        step = self.times.seconds("none")
        if self._early is not None and self._early.tokens_per_second * step > MARGIN:
            best = self._early
        else:
            best = Plan(drafter="none", tokens_per_second=MARGIN / step)
        return self._better_ngram(best, matches, most) if any(matches) else best

    def observe(self, plan: Plan, matches: Sequence[Match | None], outcome: Outcome) -> None:
        """Learn from a round."""
        started = time.perf_counter()
        self._count(plan.drafter, plan.exit_layer)
        self._observe_drafts(plan, outcome)
        for match, tokens in zip(matches, outcome.tokens, strict=False):
            if match is not None:  # also where it wasn't used
                held = match.agreement(tokens)
                self.rates.of_match(match.length).observe(held, min(held + 1, len(tokens)))
        self._observe_time(plan, outcome)
        if plan.drafter == "none" and not outcome.agreement:
            step = self.times.seconds("none")
            look = outcome.seconds + time.perf_counter() - started - step
            self._rest = self.pace.lengthen_rest(look, step) if plan.tokens_per_second > 0 else COLD_STEPS + TIMED_STEPS
        self._learning_seconds = time.perf_counter() - started

    def seconds(self, plan: Plan) -> float:
        """Predicted seconds of a round."""
        return self.times.seconds(plan.drafter, plan.exit_layer, plan.num_speculations)

    def _count(self, drafter: Drafter, exit_layer: int, rounds: int = 1) -> None:
        self._rounds += rounds
        self.counts[drafter, exit_layer] += rounds

    def _observe_drafts(self, plan: Plan, outcome: Outcome) -> None:
        if plan.drafter == "early_exit":
            rates = self.rates.of_exit(plan.exit_layer)
            for row, (held, drafted) in enumerate(zip(outcome.held, outcome.drafted, strict=True)):
                rates.observe(held, drafted, outcome.confidences[row] if outcome.confidences else ())
        others = {exit_: seen for exit_, seen in outcome.agreement.items() if exit_ != plan.exit_layer}
        self.rates.observe_exits(others)
        self._stale = self._stale or plan.drafter == "early_exit" or bool(others)

    def _observe_time(self, plan: Plan, outcome: Outcome) -> None:
        drafted, seconds = max(outcome.drafted, default=0), outcome.seconds
        if outcome.agreement:
            self.pace.observe_probe(max(0.0, seconds - self.times.seconds(plan.drafter, plan.exit_layer, drafted)))
        elif plan.drafter != "none":
            self.pace.observe_drafts(seconds)
            if outcome.typical:
                self.times.observe(plan.drafter, plan.exit_layer, drafted, seconds + self._learning_seconds)

    def _times_steps(self) -> bool:
        """Whether the next rounds should be without drafts, to know what drafting is held against."""
        if self.times.timed("none") == 0:
            return self._rounds >= FIRST_PROBES
        return self.pace.steps_are_due

    def _best_early(self, most: int) -> Plan | None:
        """The best exit and length, however it compares with a step."""
        best: Plan | None = None
        for exit_layer in self.exits:
            times, tokens, speed = self.times.of_lengths("early_exit", exit_layer), 1.0, 0.0
            for drafts, chance in enumerate(self.rates.of_exit(exit_layer).chances(most), start=1):
                tokens += chance
                if tokens / times[drafts] < speed:  # gains fall with depth
                    break
                speed = tokens / times[drafts]
                if best is None or speed > best.tokens_per_second:
                    best = Plan(
                        drafter="early_exit", exit_layer=exit_layer, num_speculations=drafts, tokens_per_second=speed
                    )
        return self._with_stop(best, most) if best is not None and self.stops_early else best

    def _with_stop(self, plan: Plan, most: int) -> Plan:
        """The same exit with as many drafts as are likely to hold: another one must gain more time than it takes."""
        rates, times = self.rates.of_exit(plan.exit_layer), self.times.of_lengths("early_exit", plan.exit_layer)
        slope = times[most] - times[1]
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
        rates = [self.rates.of_match(match.length).value if match is not None else 0.0 for match in matches]
        tokens, chances, times = float(len(rates)), [1.0] * len(rates), self.times.of_lengths("ngram", 0)
        for drafts in range(1, most + 1):
            chances = [chance * rate for chance, rate in zip(chances, rates, strict=True)]
            tokens += sum(chances)
            speed = tokens / len(rates) / times[drafts]
            if speed > best.tokens_per_second:
                best = Plan(drafter="ngram", num_speculations=drafts, tokens_per_second=speed)
        return best
