"""The adaptive policy: who drafts in a round, at which exit, and how many tokens, by the highest expected tokens/s.

Costs are measured (`costs.py`) and corrected by the seconds that rounds really take (`round_times.py`), for the number
of rows that run at present. Acceptance is tracked (`rates.py`), also for exits that aren't used: every so often a round
keeps the hidden states that it passes anyway, and the head says what each exit would have drafted. Where no drafting
is expected to gain, the round is a plain step, and while that goes on, the policy plans several steps at once.
Source: arXiv:2504.05598 (exit and length chosen each round from the agreement seen so far).
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from layerskip.decoding.adaptive.budget import budget_of, plan_of, share_out
from layerskip.decoding.adaptive.knowledge import Knowledge
from layerskip.decoding.adaptive.outlook import Classes, Outlook, best_outlook
from layerskip.decoding.adaptive.pace import (
    COLD_ROUNDS,
    COLD_STEPS,
    LOOK_SHARE,
    STEPS_EVERY,
    TIMED_STEPS,
)
from layerskip.decoding.adaptive.rates import ENOUGH_TOKENS, AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.adaptive.texts import chances_after, observe_match, worth_watching
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.policy import BatchView, DraftSource, Plan, RoundResult
from layerskip.model.drafts import StopRule

MOST_DRAFTS = 12
MARGIN, STAYING = 1.02, 1.0
"""Speedups that drafting must be expected to bring to begin, and to go on: the first rounds find cold caches."""
PLAN_EVERY, MOST_KEPT = 4, 64
"""Rounds that keep an exit and its thresholds: rates don't move faster; more where planning would take too long."""
ROW_WEIGHT = 12.0
"""Drafts: the weight of what is known of all rows against a row's own latest drafts."""
FIRST_ROUNDS = 8
"""Rounds before plain steps are timed, at the start of the first generation."""
WORTH_MEASURING = 0.95
"""Speedup that drafting must be expected to bring for its costs to be measured."""


def candidate_exits(num_layers: int) -> tuple[int, ...]:
    """Exits worth following: eighths of the depth up to the half of it, and the first layer."""
    return tuple(sorted({1, *(max(1, num_layers * i // 8) for i in range(1, 5))} - {num_layers}))


@dataclass(kw_only=True)
class AdaptivePolicy:
    """Plans each round by what has been observed so far; for the rows of one batch, which may come and go."""

    knowledge: Knowledge
    exits: tuple[int, ...]
    """Exits that may draft."""
    most_drafts: int = MOST_DRAFTS
    stops_early: bool = True
    """Whether drafting may end when drafts become doubtful. On a GPU without graphs, asking costs more than it gives;
    graphs make a fixed number of drafts faster (`Costs.asking`), so that both are considered."""
    uses_text: bool = True
    """Whether the sequence itself may draft."""
    counts: Counter[tuple[DraftSource, int]] = field(default_factory=Counter)
    """Rounds by source of their drafts and exit."""

    def __post_init__(self) -> None:
        self._num_rows, self._samples = 0, [False]
        self._matches: Sequence[Match | None] = ()
        self._histories: Sequence[tuple[float, float]] = ((0.0, 0.0),)
        self._gives_up = True
        self._keep_for = PLAN_EVERY
        self._rounds = 0
        self._drafted_rounds = 0
        self._best: Plan | None = None
        self._stale, self._planned_at = True, -MOST_KEPT
        self._planning_seconds = self._learning_seconds = 0.0
        self._rest = 0
        self._watched, self._watched_at, self._watched_drafts = 0, -PLAN_EVERY, False

    def prepare(self, view: BatchView) -> None:
        """Look up costs for this many rows, and begin with other sequences than the last ones."""
        self.knowledge.recall(view.num_rows)
        self._see(view)
        forgotten = [self.knowledge.rates(samples=samples).forget_recent() for samples in set(self._samples)]
        if any(forgotten):
            self._best, self._stale, self.pace.best = None, True, None
        self.pace.begin_text()
        self._rest = self.pace.rest

    @property
    def times(self) -> RoundTimes:
        """Predicted seconds of rounds with the rows that run at present."""
        return self._times

    def rates_of(self, exit_layer: int) -> float:
        """Acceptance rate of an exit's drafts, over the rows that run at present."""
        return self._mean(lambda rates: rates.of_exit(exit_layer).overall.value)

    def seconds(self, plan: Plan) -> float:
        """Predicted seconds of a round."""
        return self.times.seconds(plan.source, plan.exit_layer, plan.num_speculations)

    def plan(self, view: BatchView) -> Plan:
        """The round with the highest expected tokens/s; while that is a plain step, more and more of them at once."""
        self._see(view)
        self._planning_seconds = 0.0
        if self._rest:
            steps, self._rest, self._matches = self._rest, 0, ()
            return Plan(source="none", steps=steps, until_repeated=self._worth_watching())
        self._look()
        started = time.perf_counter()
        self.times.context = view.context
        self._histories = view.histories
        self._matches = view.matches() if self.uses_text else ()
        plan = self._choose(view.remaining)
        times_steps = plan.source == "none" and plan.tokens_per_second == 0
        if not times_steps and self._probe_is_due():
            return replace(plan, probe=self.exits)
        match plan.source:
            case "layers":
                return replace(plan, lease=self._lease(), until_repeated=self._worth_watching(plan))
            case "none":
                steps = COLD_STEPS + TIMED_STEPS if times_steps else self.pace.next_rest(self.times.seconds("none"))
                plan = replace(plan, steps=steps, until_repeated=0 if times_steps else self._worth_watching())
                self._planning_seconds = self.knowledge.since(started) + self._learning_seconds
                return plan
            case _:
                return plan

    def observe(self, plan: Plan, result: RoundResult) -> None:
        """Learn from what the last plan gave."""
        started = time.perf_counter()
        if plan.steps:
            self._observe_steps(result.step_seconds)
        else:
            self._count(plan.source, plan.exit_layer)
            self._observe_drafts(plan, result)
            self._observe_time(plan, result)
        for row, match in enumerate(self._matches):
            if match is not None:  # observed where it wasn't used, too
                observe_match(match, result.gained(row), self.knowledge.rates(samples=self._samples[row]))
        self._matches = ()  # rounds that follow in the same lease are at other places of the text
        self._learning_seconds = self.knowledge.since(started)

    def _see(self, view: BatchView) -> None:
        """Take note of the rows that run at present."""
        self._gives_up = not view.by_distribution
        if view.num_rows == self._num_rows and list(view.samples) == self._samples:
            return
        self._num_rows, self._samples = view.num_rows, list(view.samples)
        draws = any(self._samples)
        self._times = self.knowledge.times(self._num_rows, samples=draws)
        self.pace = self.knowledge.pace(self._num_rows, samples=draws)
        self.most_drafts = min(self.most_drafts, self._times.costs.most_drafts)
        self._best, self._stale, self._planned_at = None, True, self._rounds - MOST_KEPT
        alone = self._num_rows == 1  # several rows have histories of their own
        if alone and self.pace.best is not None and self.pace.best[0] == self._kind:
            self._best, self._stale = self.pace.best[1], False

    @property
    def _kind(self) -> Hashable:
        """What the best exit and its drafts depend on, beside what is known of drafts."""
        return self.exits, self.most_drafts, self._gives_up, self._samples[0]

    def _mean(self, value: Callable[[AcceptanceRates], float]) -> float:
        """A rate's mean over the rows."""
        draws = sum(self._samples) / len(self._samples)
        parts = ((1 - draws, False), (draws, True))
        return sum(share * value(self.knowledge.rates(samples=samples)) for share, samples in parts if share)

    def _chances(self, exit_layer: int, most: int) -> list[list[float]]:
        """For each row the probability that the first 1, 2, ... `most` drafts of a round are all accepted."""
        chances = {
            samples: list(self.knowledge.rates(samples=samples).of_exit(exit_layer).chances(most))
            for samples in set(self._samples)
        }
        factors = self._row_factors(exit_layer)
        return [
            [min(1.0, chance * factor**depth) for depth, chance in enumerate(chances[samples], start=1)]
            for samples, factor in zip(self._samples, factors, strict=True)
        ]

    def _row_factors(self, exit_layer: int) -> list[float]:
        """For each row, how much likelier its drafts are accepted than those of all rows, by its latest ones."""
        if self._num_rows == 1:
            return [1.0]  # all that is known is of this row
        usual = max(0.01, self.rates_of(exit_layer))
        return [(accepted + ROW_WEIGHT * usual) / (tried + ROW_WEIGHT) / usual for accepted, tried in self._histories]

    def _look(self) -> None:
        """Measure costs, where drafting might win, within the share of the time that this may take.

        What has begun goes on: half of the costs, one of them disturbed, must not be the last word.
        """
        best, begun = self._best, self.pace.measuring_seconds > 0
        if begun or (best is not None and best.tokens_per_second * self.times.seconds("none") > WORTH_MEASURING):
            self.pace.measuring_seconds += self.knowledge.look(self._num_rows, self.pace.measuring_budget)

    def _probe_is_due(self) -> bool:
        """Whether probes have taken no more than their share of the time; there is none where one exit may draft."""
        if not self.exits or (len(self.exits) == 1 and self.times.timed("layers")):
            return False
        rates = [self.knowledge.rates(samples=samples) for samples in set(self._samples)]
        tried = min(each.of_exit(exit_layer).overall.long.tried for each in rates for exit_layer in self.exits)
        expected = len(self.exits) * self.times.costs.fixed[0] * self.times.correction("none")
        return self.pace.probe_is_due(expected, first=tried < ENOUGH_TOKENS)

    def _choose(self, remaining: int) -> Plan:
        if remaining <= 1 or self._times_steps():
            return Plan(source="none")
        most = min(self.most_drafts, remaining - 1)
        step = self.times.seconds("none")
        if self._stale and self._rounds - self._planned_at >= self._keep_for:
            started = time.perf_counter()
            self._best = self._best_layers(most)
            self._stale, self._planned_at = False, self._rounds
            self.pace.best = self._kind, self._best
            rounds = self.knowledge.since(started) / (LOOK_SHARE * step)
            self._keep_for = int(min(MOST_KEPT, max(PLAN_EVERY, rounds)))
        if self._best is not None and self._drafts(self._best, step):
            best = self._best
        else:
            best = Plan(source="none", tokens_per_second=MARGIN / step)
        return self._better_text(best, most) if any(self._matches) else best

    def _drafts(self, plan: Plan, step: float) -> bool:
        """Whether early layers draft: because they are expected to gain, or to try them."""
        gain = plan.tokens_per_second * step
        return gain > (STAYING if self._drafted_rounds else MARGIN) or self.pace.tries(step, gain)

    def _lease(self) -> int:
        """Rounds with drafts by early layers that would be planned alike, whatever the ones before them give."""
        limits = [self._keep_for - (self._rounds - self._planned_at), STEPS_EVERY - self.pace.since_steps]
        if self.pace.trial:
            limits.append(self.pace.trial)
        if not self.times.timed("none"):
            limits.append(FIRST_ROUNDS - self._rounds)
        return max(1, min(limits))

    def _worth_watching(self, planned: Plan | None = None) -> int:
        """The least number of repeated tokens after which a row's text would draft better, or might; 0: none.

        Args:
            planned: Better than this; than plain steps if not given.
        """
        speed = 1 / self.times.seconds("none") if planned is None else planned.tokens_per_second
        drafts = planned is not None
        if self.uses_text and (self._rounds - self._watched_at >= PLAN_EVERY or drafts != self._watched_drafts):
            self._watched_at, self._watched_drafts = self._rounds, drafts
            rates = [self.knowledge.rates(samples=samples) for samples in set(self._samples)]
            seconds = self.times.of_rows("text", 0, self._num_rows)
            self._watched = worth_watching(rates, self._num_rows, self.most_drafts, seconds, speed)
        return self._watched if self.uses_text else 0

    def _count(self, source: DraftSource, exit_layer: int, rounds: int = 1) -> None:
        self._rounds += rounds
        self._drafted_rounds = 0 if source == "none" else self._drafted_rounds + 1
        self.counts[source, exit_layer] += rounds

    def _observe_steps(self, seconds: Sequence[float]) -> None:
        self._count("none", 0, len(seconds))
        step = self.pace.observe_steps(seconds)
        if step is not None:
            self.times.observe("none", 0, 0, step)
        if seconds and self._planning_seconds:  # the first step finds the caches cold, and the call itself takes time
            self.pace.observe_look(self._planning_seconds, seconds[0] - self.times.seconds("none"))

    def _observe_drafts(self, plan: Plan, result: RoundResult) -> None:
        if plan.source == "layers":
            for row in range(len(result.drafts)):
                rates = self.knowledge.rates(samples=self._samples[row]).of_exit(plan.exit_layer)
                rates.observe(*result.tried(row), result.confidences[row] if result.confidences else ())
        others = {exit_: seen for exit_, seen in result.agreement.items() if exit_ != plan.exit_layer}
        for samples in set(self._samples):
            share = self._samples.count(samples) / len(self._samples)
            part = {exit_: (share * agreed, share * tokens) for exit_, (agreed, tokens) in others.items()}
            self.knowledge.rates(samples=samples).observe_exits(part)
        if plan.source == "layers" or others:
            self._stale, self.pace.best = True, None

    def _observe_time(self, plan: Plan, result: RoundResult) -> None:
        seconds, (verified, drawn, most) = result.seconds, self._work(result)
        if result.agreement:
            expected = self.times.seconds(plan.source, plan.exit_layer, verified, drawn, most)
            self.pace.observe_probe(max(0.0, seconds - expected))
        elif plan.source == "none":
            self.pace.observe_steps([seconds])
        else:
            self.pace.observe_drafts(seconds, layers=plan.source == "layers")
            # The first rounds find everything cold; what is drafted from text is the same work after plain steps too.
            warm = self._rounds if plan.source == "text" else self._drafted_rounds
            if result.settled and warm > COLD_ROUNDS:
                seconds += self._learning_seconds
                if plan.stop is not None:  # what is learned is the time of a fixed number of drafts
                    asking = self.times.costs.asking * self.times.correction(plan.source)
                    seconds = max(seconds / 2, seconds - asking * most)
                self.times.observe(plan.source, plan.exit_layer, verified, seconds, drawn=drawn, most=most)

    def _work(self, result: RoundResult) -> tuple[float, float | None, float]:
        """What a round did, as `Costs.round` takes it: drafts that were verified and drawn, and passes of drafting."""
        verified = [len(row) for row in result.drafts]
        drawn = [len(row) for row in result.confidences] or verified
        most = max(drawn, default=0)
        if not self.times.costs.ragged:
            return max(verified, default=0), None, most
        return sum(verified) / len(verified), sum(drawn) / len(drawn), most

    def _times_steps(self) -> bool:
        """Whether the next rounds should be without drafts, to know what drafting is compared with."""
        if self.times.timed("none") == 0:
            return self._rounds >= FIRST_ROUNDS
        return self.pace.steps_are_due

    def _best_layers(self, most: int) -> Plan | None:
        """The best exit and its drafts, however they compare with a step."""
        ways: list[Callable[[int, int], Plan | None]] = [self._by_thresholds] if self.stops_early else []
        if not self.stops_early or self.times.costs.asking:
            ways.append(self._by_lengths)
        plans = [plan for exit_layer in self.exits for find in ways if (plan := find(exit_layer, most)) is not None]
        return max(plans, key=lambda plan: plan.tokens_per_second, default=None)

    def _by_lengths(self, exit_layer: int, most: int) -> Plan | None:
        """The best numbers of drafts that are known before any is drawn; one for each row where none gain."""
        chances = self._chances(exit_layer, most)
        seconds = self.times.of_rows("layers", exit_layer, self._num_rows)
        plan = plan_of(share_out(chances, seconds), "layers", exit_layer)
        return plan or plan_of(budget_of(chances, (1,) * self._num_rows, seconds), "layers", exit_layer)

    def _by_thresholds(self, exit_layer: int, most: int) -> Plan:
        """As many drafts as are likely to be accepted: each must be worth more than its time."""
        num_rows, times = self._num_rows, self.times
        ragged = times.costs.ragged
        gives_up = self._gives_up and (ragged or num_rows == 1)
        classes = self._classes(exit_layer)
        correction = times.correction("layers")
        start = exit_layer if times.costs.shares_states else 0

        def seconds(outlook: Outlook) -> float:
            asking = correction * times.costs.asking * outlook.passes
            if not ragged and num_rows > 1:
                return asking + times.seconds("layers", exit_layer, outlook.passes)
            return asking + times.seconds("layers", exit_layer, outlook.verified, outlook.drawn, outlook.passes)

        def prices(outlook: Outlook) -> tuple[float, float]:
            costs, verified = times.costs, max(1.0, outlook.verified if ragged else outlook.passes)
            verify = costs.verification(start, verified) - costs.verification(start, verified - 1)
            draw = costs.asking + costs.drafting(exit_layer, 2) - costs.drafting(exit_layer, 1)
            return correction * draw, correction * verify

        found = best_outlook(
            classes,
            seconds,
            prices,
            most=most,
            num_rows=num_rows,
            speed=1 / times.seconds("none"),
            gives_up=gives_up,
        )
        lengths: tuple[int, ...] = ()
        if num_rows > 1 and ragged:
            draw = found.tokens_per_second * prices(found)[0]
            lengths = tuple(
                most if classes.worth(factor, found.kept, gives_up=gives_up) >= draw else 0
                for factor in self._row_factors(exit_layer)
            )
            if not any(lengths):
                lengths = ()
        return Plan(
            source="layers",
            exit_layer=exit_layer,
            num_speculations=most,
            lengths=lengths,
            tokens_per_second=found.tokens_per_second,
            stop=StopRule(rates=tuple(classes.rates), least=found.least, kept=found.kept),
        )

    def _classes(self, exit_layer: int) -> Classes:
        """Drafts by confidence, over the rows that run at present."""
        exits = {samples: self.knowledge.rates(samples=samples).of_exit(exit_layer) for samples in set(self._samples)}
        rates = {samples: each.by_confidence() for samples, each in exits.items()}
        shares = {samples: each.shares() for samples, each in exits.items()}
        return Classes(rates=self._over_rows(rates), shares=self._over_rows(shares))

    def _over_rows(self, values: Mapping[bool, tuple[float, ...]]) -> tuple[float, ...]:
        """The mean over the rows, by whether they sample."""
        if len(values) == 1:
            return next(iter(values.values()))
        by_row = [values[samples] for samples in self._samples]
        return tuple(sum(row) / len(row) for row in zip(*by_row, strict=True))

    def _better_text(self, best: Plan, most: int) -> Plan:
        """The best numbers of drafts from the sequences themselves, if they are better than `best`."""
        chances = chances_after(
            self._matches, [self.knowledge.rates(samples=samples) for samples in self._samples], most
        )
        plan = plan_of(share_out(chances, self.times.of_rows("text", 0, self._num_rows)), "text")
        # The best of many rows' chances is likelier to be overestimated than underestimated.
        least = best.tokens_per_second * (MARGIN if self._num_rows > 1 else 1.0)
        return plan if plan is not None and plan.tokens_per_second > least else best
