"""Costs, batches and results for policies that are tried without a network, and a policy of random ragged rounds."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.adaptive.pace import Pace
from layerskip.decoding.adaptive.policy import AdaptivePolicy
from layerskip.decoding.adaptive.rates import AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.policy import BatchView, DraftSource, Plan, RoundResult
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule


@dataclass
class View:
    """A batch, as far as a policy sees it."""

    found: Sequence[Match | None] = (None,)
    remaining: int = 100
    samples: Sequence[bool] = (False,)
    by_distribution: bool = False
    context: int = 0
    past: Sequence[tuple[float, float]] = ()
    """As `BatchView.histories`; nothing if not given."""

    @property
    def histories(self) -> Sequence[tuple[float, float]]:
        return self.past or [(0.0, 0.0)] * self.num_rows

    @property
    def num_rows(self) -> int:
        return len(self.samples)

    def matches(self) -> Sequence[Match | None]:
        return self.found


def make_costs(*, row: float = 0.05, fixed: float = 0.5, num_layers: int = 16) -> Costs:
    """A layer takes 1, each further token `row` more; all else of a call `fixed`."""
    return Costs(
        num_layers=num_layers,
        layer=tuple(1 + row * n for n in range(13)),
        fixed=(fixed,) * 13,
        draft_layer=1.0,
        draft_head=fixed,
        draft_fixed=0.1,
    )


class Known:
    """What is known of one model (`policy.Knowledge`): costs of a size are those of all sizes."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.recalled: list[int] = []
        self.budgets: list[float] = []
        self._times: dict[tuple[int, bool], RoundTimes] = {}
        self._paces: dict[tuple[int, bool], Pace] = {}
        self._rates: dict[bool, AcceptanceRates] = {}

    def recall(self, num_rows: int) -> None:
        self.recalled.append(num_rows)

    def look(self, num_rows: int, budget: float) -> float:
        self.budgets.append(budget)
        return max(0.0, budget)

    def since(self, started: float) -> float:
        return time.perf_counter() - started

    def times(self, num_rows: int, *, samples: bool) -> RoundTimes:
        return self._times.setdefault((num_rows, samples), RoundTimes(costs=self._costs))

    def pace(self, num_rows: int, *, samples: bool) -> Pace:
        return self._paces.setdefault((num_rows, samples), Pace())

    def rates(self, *, samples: bool) -> AcceptanceRates:
        return self._rates.setdefault(samples, AcceptanceRates())


def rates_of(policy: AdaptivePolicy) -> AcceptanceRates:
    return policy.knowledge.rates(samples=False)


def result(num_accepted: int, num_drafts: int, seconds: float, tokens: Sequence[int] = (), **rest: Any) -> RoundResult:
    """Of one row; what it gained is `tokens`, zeros if not given."""
    gained = list(tokens) or [0] * (num_accepted + 1)
    drafts = (*gained[:num_accepted], *[-1] * (num_drafts - num_accepted))
    return RoundResult(
        drafts=[drafts], num_accepted=[num_accepted], tokens=[gained[num_accepted]], seconds=seconds, **rest
    )


class Ragged:
    """Plans rounds in which every row has another number of drafts, at random, some rows none."""

    def __init__(
        self, seed: int, exits: Sequence[int], *, most: int = 5, text: bool = True, doubts: bool = True
    ) -> None:
        """Begin with the same seed, the same plans.

        Args:
            seed: Of the plans.
            exits: Exits that draft.
            most: Drafts of a row at most.
            text: Whether some rounds draft from the text.
            doubts: Whether some rounds stop early, and give up doubtful drafts.
        """
        self._pick, self._exits, self._most, self._text, self._doubts = random.Random(seed), exits, most, text, doubts
        self.lengths: list[list[int]] = []
        """Verified drafts of each row, by round."""

    def prepare(self, view: BatchView) -> None:
        """Nothing to measure."""

    def plan(self, view: BatchView) -> Plan:
        """A random one."""
        pick = self._pick
        lengths = tuple(pick.choice([0, pick.randint(0, self._most), self._most]) for _ in range(view.num_rows))
        source: DraftSource = "text" if self._text and pick.random() < 0.25 else "layers"
        stop = None
        if self._doubts and pick.random() < 0.5:
            rates = tuple(pick.random() for _ in range(CONFIDENCE_CLASSES))
            stop = StopRule(rates=rates, least=pick.random() / 2, kept=pick.choice([0.0, 0.2, 0.5]))
        exit_layer = pick.choice(self._exits) if source == "layers" else 0
        return Plan(source=source, exit_layer=exit_layer, num_speculations=self._most, lengths=lengths, stop=stop)

    def observe(self, plan: Plan, result: RoundResult) -> None:
        """Note what rows had, which is no more than planned."""
        self.lengths.append([len(row) for row in result.drafts])
        assert all(found <= most for found, most in zip(self.lengths[-1], plan.lengths, strict=True))

    @property
    def is_ragged(self) -> bool:
        """Whether rows of one round did have different numbers of drafts, and some none."""
        return any(len(set(row)) > 2 and min(row) == 0 for row in self.lengths)


def steps(policy: AdaptivePolicy, seconds: Sequence[float]) -> None:
    """Plain steps that were planned at once."""
    none = RoundResult(drafts=(), num_accepted=(), tokens=(), step_seconds=seconds)
    policy.observe(Plan(source="none", steps=len(seconds)), none)


class Erratic:
    """Another plan for every round, at random; every other one with probes, some of several steps."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.pick = random.Random(seed)
        self.exits = tuple(range(1, num_layers))
        self.seen: list[Plan] = []
        self.prepared = self.stopped = self.rested = 0
        self.num_rows = 0

    def prepare(self, view: BatchView) -> None:
        self.prepared += view.num_rows

    def plan(self, view: BatchView) -> Plan:
        self.num_rows = view.num_rows
        assert len(view.samples) == len(view.matches()) == view.num_rows
        assert view.remaining > 0
        steps = self.pick.choice([0, 0, 0, 0, 0, 1, 2])
        if steps:
            return Plan(source="none", steps=steps)
        source: DraftSource = self.pick.choice(["none", "layers", "layers", "text"])
        exit_layer = self.pick.randrange(1, len(self.exits) + 2) if source == "layers" else 0
        stop = None
        if self.pick.random() < 0.5:
            rates = tuple(self.pick.random() for _ in range(CONFIDENCE_CLASSES))
            stop = StopRule(rates=rates, least=self.pick.random() / 2)
        probe = self.exits if self.pick.random() < 0.5 else ()
        drafts = self.pick.randrange(1, 7)
        plan = Plan(source=source, exit_layer=exit_layer, num_speculations=drafts, stop=stop, probe=probe)
        self.seen.append(plan)
        return plan

    def observe(self, plan: Plan, result: RoundResult) -> None:
        if plan.steps:
            assert len(result.step_seconds) <= plan.steps  # fewer where steps were compiled on the way
            assert all(seconds > 0 for seconds in result.step_seconds)
            self.rested += 1
            return
        assert plan is self.seen[-1]
        assert len(result.num_accepted) == len(result.drafts) == len(result.tokens) == self.num_rows
        assert result.seconds > 0
        tried = [result.tried(row)[1] for row in range(self.num_rows)]
        drafted = max(tried)
        assert drafted <= plan.num_speculations
        assert all(0 < x <= 1.001 for row in result.confidences for x in row)
        assert all(len(row) >= least for row, least in zip(result.confidences, tried, strict=False))
        self.stopped += bool(result.confidences) and drafted < plan.num_speculations
        assert set(result.agreement) <= set(plan.probe)
        assert not plan.probe or set(result.agreement) >= {exit_ for exit_ in plan.probe if exit_ > plan.exit_layer}
        for agreed, tokens in result.agreement.values():
            assert 0 <= agreed <= tokens + 1e-4
