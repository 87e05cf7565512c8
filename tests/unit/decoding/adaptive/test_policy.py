"""What is planned for a round, from given costs and given acceptance."""

from collections.abc import Sequence
from typing import Any

import pytest

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.adaptive.pace import COLD_STEPS, FIRST_REST, LOOK_SHARE, MOST_REST, STEPS_EVERY, TIMED_STEPS
from layerskip.decoding.adaptive.policy import FIRST_PROBES, AdaptivePolicy, candidate_exits
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.ngram import Match
from layerskip.decoding.policy import FixedPolicy, Outcome, Plan

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
    times = RoundTimes(costs=make_costs(**costs))  # type: ignore[arg-type]
    policy = AdaptivePolicy(times=times, exits=tuple(rates), **(options or {}))
    for exit_layer, rate in rates.items():
        for _ in range(200):
            policy.rates.observe_exits({exit_layer: (5 * rate, 5)})
    policy.times.observe("none", 0, 0, times.costs.step())  # steps have been timed
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
        (exit_layer, drafts): (1 - rate ** (drafts + 1)) / (1 - rate) / policy.times.costs.round(exit_layer, drafts)
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
    for _ in range(150):
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
    for _ in range(150):
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
        policy.observe(plan, NONE, outcome(0, 4, policy.times.costs.round(4, 4)))
    assert policy.rates.of_exit(4).overall.value < 0.4
    assert policy.plan(NONE, 100).drafter == "none"


def test_rounds_that_take_longer_than_predicted_correct_the_costs() -> None:
    policy = make_policy({4: 0.8})
    assert policy.plan(NONE, 100).drafter == "early_exit"
    for _ in range(60):
        policy.observe_rest([policy.times.costs.step()] * 8)
        policy.observe(
            Plan(drafter="early_exit", exit_layer=4), NONE, outcome(4, 4, 3 * policy.times.costs.round(4, 4), range(5))
        )
    assert policy.times.correction("early_exit") == pytest.approx(3, rel=1e-3)
    assert policy.times.correction("none") == pytest.approx(1)
    assert policy.plan(NONE, 100).drafter == "none"


def test_a_few_slow_rounds_change_nothing() -> None:
    policy = make_policy({4: 0.8})
    for seconds in (1.0, 1.0, 50.0, 1.0):
        policy.observe_rest([seconds * policy.times.costs.step()] * 8)
    assert policy.times.correction("none") == 1
    assert policy.times.correction("ngram") == 1


def test_first_steps_of_a_rest_are_not_timed() -> None:
    policy, step = make_policy({4: 0.8}), make_costs().step()
    for _ in range(9):
        policy.observe_rest([9 * step] * COLD_STEPS + [2 * step] * TIMED_STEPS)
    policy.observe_rest([9 * step] * 3)
    assert policy.times.correction("none") == pytest.approx(2)


def follow(policy: AdaptivePolicy, rounds: int) -> list[str]:
    """Who drafted in each round; every draft holds, and all takes the time that it should."""
    drafters: list[str] = []
    while len(drafters) < rounds:
        steps = policy.rests()
        if steps:
            policy.observe_rest([policy.times.seconds("none")] * steps)
            drafters += ["none"] * steps
            continue
        plan = policy.plan(NONE, 100)
        drafts = plan.num_speculations
        policy.observe(plan, NONE, outcome(drafts, drafts, policy.seconds(plan), range(drafts + 1)))
        drafters.append(plan.drafter)
    return drafters


def test_steps_without_drafts_are_timed_now_and_then() -> None:
    policy = make_policy({4: 0.9})
    policy.times.ratios.clear()
    drafters = follow(policy, 3 * STEPS_EVERY)
    block = 1 + COLD_STEPS + TIMED_STEPS
    assert drafters[: FIRST_PROBES + block + 1] == ["early_exit"] * FIRST_PROBES + ["none"] * block + ["early_exit"]
    assert drafters.count("none") == 3 * block
    assert policy.times.timed("none") == 3
    assert sum(policy.counts.values()) == len(drafters)


def test_rests_grow_while_nothing_is_better() -> None:
    policy, lengths = make_policy({4: 0.05}), []
    for _ in range(9):
        plan = policy.plan(NONE, 1000)
        assert plan.drafter == "none"
        policy.observe(plan, NONE, outcome(0, 0, 1.5 * policy.times.costs.step()))
        lengths.append(policy.rests())
        assert policy.rests() == 0
        policy.observe_rest([policy.times.costs.step()] * lengths[-1])
    assert lengths[:3] == [2, 4, 8]
    assert lengths[-1] == MOST_REST
    again = AdaptivePolicy(times=policy.times, exits=policy.exits, pace=policy.pace)
    assert again.rests() == FIRST_REST  # the next text begins as the last one ended
    policy.observe(Plan(drafter="ngram"), [MATCH], outcome(4, 4, 19.0, MATCH.tokens[:5]))
    policy.observe(plan, NONE, outcome(0, 0, 1.5 * policy.times.costs.step()))
    assert policy.rests() == 2


def test_rests_are_short_where_looking_costs_little() -> None:
    policy = make_policy({4: 0.05})
    for _ in range(9):
        policy.observe(policy.plan(NONE, 1000), NONE, outcome(0, 0, 1.02 * policy.times.costs.step()))
    assert policy.rests() == int(0.02 / LOOK_SHARE)


def test_probes_come_first_and_then_take_their_share() -> None:
    policy = AdaptivePolicy(times=RoundTimes(costs=make_costs()), exits=(2, 4))
    probed = 0
    for _ in range(2000):
        seconds = policy.times.costs.step()
        agreement = {}
        if policy.probes:
            probed += 1
            seconds += 10
            agreement = {2: (0.0, 1), 4: (1.0, 1)}
        policy.observe(Plan(drafter="none"), NONE, outcome(0, 0, seconds, agreement=agreement))
        policy.observe_rest([policy.times.costs.step()])
    assert probed >= 3
    assert 10 * probed < 0.03 * 2000 * policy.times.costs.step()
    assert policy.rates.of_exit(2).overall.value < policy.rates.of_exit(4).overall.value


def test_what_is_known_needs_no_first_probes() -> None:
    assert not make_policy({2: 0.5, 4: 0.7}).probes
    assert not AdaptivePolicy(times=RoundTimes(costs=make_costs(num_layers=1)), exits=()).probes


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


def test_times_of_rounds_that_are_not_compiled_yet_are_not_learned() -> None:
    policy = make_policy({4: 0.8}, {"stops_early": False})
    plan = policy.plan(NONE, 100)
    predicted = policy.seconds(plan)
    policy.observe(plan, NONE, outcome(plan.num_speculations, plan.num_speculations, 50 * predicted, typical=False))
    assert policy.seconds(plan) == pytest.approx(predicted)
    assert policy.rates.of_exit(4).overall.recent.tried > 0


def test_drafters_that_were_never_timed_are_corrected_as_steps_are() -> None:
    """On a GPU a captured step takes a tenth of what its costs say; so will captured rounds with drafts."""
    times = RoundTimes(costs=make_costs())
    for _ in range(5):
        times.observe("none", 0, 0, 0.1 * times.costs.step())
    assert times.seconds("early_exit", 4, 4) == pytest.approx(0.1 * times.costs.round(4, 4))
    times.observe("early_exit", 4, 4, 0.3 * times.costs.round(4, 4))
    assert times.seconds("early_exit", 4, 4) == pytest.approx(0.3 * times.costs.round(4, 4))
