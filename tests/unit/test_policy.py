"""What is planned for a round, from given costs and given acceptance."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from layerskip.decoding.costs import Costs
from layerskip.decoding.ngram import Match
from layerskip.decoding.policy import AdaptivePolicy, FixedPolicy, Outcome, Plan, candidate_exits

NONE: tuple[None, ...] = (None,)
MATCH = Match(length=5, tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])


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


def make_policy(rates: dict[int, float], options: dict[str, Any] | None = None, **costs: float) -> AdaptivePolicy:
    policy = AdaptivePolicy(costs=make_costs(**costs), exits=tuple(rates), **(options or {}))  # type: ignore[arg-type]
    for exit_layer, rate in rates.items():
        for _ in range(200):
            policy.rates.observe_exits({exit_layer: (5 * rate, 5)})
    policy.ratios["none"] = deque([1.0] * 3, maxlen=9)  # steps have been timed
    return policy


def outcome(held: int, drafted: int, seconds: float, tokens: Sequence[int] = (0,), **rest: Any) -> Outcome:
    return Outcome(seconds=seconds, held=[held], drafted=[drafted], tokens=[list(tokens)], **rest)


def test_costs_of_steps_and_rounds() -> None:
    costs = make_costs()
    assert costs.step() == 16.5
    # 5 passes of 4 layers, 4 heads; then 12 layers and a head over 5 tokens
    assert costs.round(4, 4) == pytest.approx(5 * 4 + 4 * 0.5 + 0.1 + 12 * 1.2 + 0.5)
    assert costs.round(0, 4) == pytest.approx(16 * 1.2 + 0.5)
    assert costs.round(0, 0) == costs.step()


def test_the_plan_is_the_best_of_the_grid() -> None:
    rates = {1: 0.3, 4: 0.8, 8: 0.9}
    policy = make_policy(rates, {"stops_early": False})
    plan = policy.plan(NONE, 100)
    grid = {
        (exit_layer, drafts): (1 - rate ** (drafts + 1)) / (1 - rate) / policy.costs.round(exit_layer, drafts)
        for exit_layer, rate in rates.items()
        for drafts in range(1, 13)
    }
    assert (plan.drafter, plan.exit_layer, plan.num_speculations) == ("early_exit", *max(grid, key=grid.__getitem__))
    assert plan.tokens_per_second == pytest.approx(max(grid.values()), rel=0.01)


def test_exits_that_never_agree_are_left_alone() -> None:
    assert make_policy({1: 0.05, 4: 0.05, 8: 0.1}).plan(NONE, 100).drafter == "none"


def test_rows_that_cost_as_much_as_steps_are_not_worth_it() -> None:
    assert make_policy({4: 0.8}, row=1.0).plan(NONE, 100).drafter == "none"


def test_no_more_drafts_than_may_be_written() -> None:
    assert make_policy({4: 0.99}).plan(NONE, 3).num_speculations == 2
    assert make_policy({4: 0.99}).plan(NONE, 1).drafter == "none"
    assert make_policy({4: 0.99}, {"stops_early": False}).plan(NONE, 100).num_speculations == 12


def test_doubtful_drafts_end_a_draft() -> None:
    policy = make_policy({4: 0.8})
    for _ in range(200):
        policy.observe(
            Plan(drafter="early_exit", exit_layer=4), NONE, outcome(1, 2, 30.0, (1, 2), confidences=[[0.99, 0.3]])
        )
    for _ in range(20):
        policy.rates.observe_exits({4: (4, 5)})
    stop = policy.plan(NONE, 100).stop
    assert stop is not None
    assert stop.rates[-1] > 0.9 > stop.least > stop.rates[0]


def test_matches_are_free_drafts_if_they_hold() -> None:
    policy = make_policy({4: 0.6})
    for _ in range(20):
        policy.observe(Plan(drafter="ngram"), [MATCH], outcome(4, 4, 19.0, MATCH.tokens[:5]))
    plan = policy.plan([MATCH], 100)
    assert (plan.drafter, plan.exit_layer) == ("ngram", 0)
    assert policy.plan(NONE, 100).drafter == "early_exit"
    for _ in range(300):
        policy.observe(plan, [MATCH], outcome(0, 4, 19.0, (99,)))
    assert policy.plan([MATCH], 100).drafter == "early_exit"


def test_matches_teach_without_being_used() -> None:
    policy = make_policy({4: 0.6})
    for _ in range(20):
        policy.observe(Plan(drafter="none"), [MATCH], outcome(0, 0, 16.5, MATCH.tokens[:3]))
    assert policy.rates.of_match(MATCH.length).value > 0.9


def test_a_text_that_changes_its_kind_changes_the_plan() -> None:
    policy = make_policy({4: 0.95})
    plan = policy.plan(NONE, 100)
    for _ in range(100):
        policy.observe(plan, NONE, outcome(0, 4, policy.costs.round(4, 4)))
    assert policy.rates.of_exit(4).overall.value < 0.4
    assert policy.plan(NONE, 100).drafter == "none"


def test_rounds_that_take_longer_than_predicted_correct_the_costs() -> None:
    policy = make_policy({4: 0.8})
    assert policy.plan(NONE, 100).drafter == "early_exit"
    for _ in range(60):
        policy.observe(Plan(drafter="none"), NONE, outcome(0, 0, policy.costs.step()))
        policy.observe(
            Plan(drafter="early_exit", exit_layer=4), NONE, outcome(4, 4, 3 * policy.costs.round(4, 4), range(5))
        )
    assert policy.correction("early_exit") == pytest.approx(3)
    assert policy.correction("none") == pytest.approx(1)
    assert policy.plan(NONE, 100).drafter == "none"


def test_a_single_slow_round_changes_nothing() -> None:
    policy = make_policy({4: 0.8})
    for seconds in (1.0, 1.0, 50.0, 1.0):
        policy.observe(Plan(drafter="none"), NONE, outcome(0, 0, seconds * policy.costs.step()))
    assert policy.correction("none") == 1
    assert policy.correction("ngram") == 1


def test_steps_without_drafts_are_timed_now_and_then() -> None:
    policy = make_policy({4: 0.9})
    policy.ratios.clear()
    plans = []
    for _ in range(200):
        plans.append(policy.plan(NONE, 100))
        drafts = plans[-1].num_speculations
        policy.observe(plans[-1], NONE, outcome(drafts, drafts, policy.seconds(plans[-1]), range(drafts + 1)))
    assert [plan.drafter for plan in plans[:4]] == ["early_exit"] * 4
    assert [plan.drafter for plan in plans[4:7]] == ["none"] * 3
    assert 5 <= sum(plan.drafter == "none" for plan in plans) <= 8


def test_probes_come_first_and_then_take_their_share() -> None:
    policy = AdaptivePolicy(costs=make_costs(), exits=(2, 4))
    probed = 0
    for _ in range(2000):
        seconds = policy.costs.step()
        agreement = {}
        if policy.probes:
            probed += 1
            seconds += 10
            agreement = {2: (0.0, 1), 4: (1.0, 1)}
        policy.observe(Plan(drafter="none"), NONE, outcome(0, 0, seconds, agreement=agreement))
    assert probed >= 3
    assert 10 * probed < 0.03 * 2000 * policy.costs.step()
    assert policy.rates.of_exit(2).overall.value < policy.rates.of_exit(4).overall.value


def test_what_is_known_needs_no_first_probes() -> None:
    assert not make_policy({2: 0.5, 4: 0.7}).probes
    assert not AdaptivePolicy(costs=make_costs(num_layers=1), exits=()).probes


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 12, 16, 32, 80])
def test_candidates(num_layers: int) -> None:
    exits = candidate_exits(num_layers)
    assert list(exits) == sorted(set(exits))
    assert all(1 <= exit_layer < num_layers for exit_layer in exits)
    assert bool(exits) == (num_layers > 1)


def test_a_fixed_plan_stays() -> None:
    plan = Plan(drafter="early_exit", exit_layer=2, num_speculations=3)
    policy = FixedPolicy(fixed=plan)
    policy.observe(plan, NONE, outcome(0, 3, 1.0))
    assert policy.plan(NONE, 1) is plan
    assert not policy.probes
