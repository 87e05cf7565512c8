"""What is planned for a round, from given costs and given acceptance."""

import math
from dataclasses import replace
from typing import Any

import pytest
from policies import Known, View, make_costs, rates_of, result, steps

from layerskip.decoding.adaptive import pace as pace_module
from layerskip.decoding.adaptive.pace import (
    COLD_ROUNDS,
    COLD_STEPS,
    FIRST_REST,
    LOOK_SHARE,
    MEASURING_SHARE,
    MOST_REST,
    STEPS_EVERY,
    TIMED_STEPS,
    TRIAL_ROUNDS,
    TRIAL_SHARE,
    Pace,
)
from layerskip.decoding.adaptive.policy import (
    FIRST_ROUNDS,
    MARGIN,
    MOST_KEPT,
    PLAN_EVERY,
    STAYING,
    AdaptivePolicy,
    candidate_exits,
)
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.adaptive.texts import REPEATED
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.policy import FixedPolicy, Plan, RoundResult
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule

MATCH = Match(length=5, tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])


def make_policy(rates: dict[int, float], options: dict[str, Any] | None = None, **costs: float) -> AdaptivePolicy:
    """A policy that knows these exits' rates, and has timed steps."""
    policy = AdaptivePolicy(
        knowledge=Known(make_costs(**costs)),  # type: ignore[arg-type]
        exits=tuple(rates),
        **(options or {}),
    )
    policy.prepare(View())
    for exit_layer, rate in rates.items():
        for _ in range(200):
            rates_of(policy).observe_exits({exit_layer: (5 * rate, 5)})
    policy.times.observe("none", 0, 0, policy.times.costs.step())
    return policy


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
    plan = policy.plan(View())
    grid = {
        (exit_layer, drafts): (1 - rate ** (drafts + 1)) / (1 - rate) / policy.times.costs.round(exit_layer, drafts)
        for exit_layer, rate in rates.items()
        for drafts in range(1, 13)
    }
    assert (plan.source, plan.exit_layer, plan.num_speculations) == ("layers", *max(grid, key=grid.__getitem__))
    assert plan.tokens_per_second == pytest.approx(max(grid.values()), rel=0.01)


def test_exits_that_never_agree_are_left_alone() -> None:
    assert make_policy({1: 0.05, 4: 0.05, 8: 0.1}).plan(View()).source == "none"


def test_rows_that_cost_as_much_as_steps_are_not_worth_it() -> None:
    assert make_policy({4: 0.8}, row=1.0).plan(View()).source == "none"


def test_no_more_drafts_than_may_be_written() -> None:
    assert make_policy({4: 0.99}).plan(View(remaining=3)).num_speculations == 2
    assert make_policy({4: 0.99}).plan(View(remaining=1)).source == "none"
    assert make_policy({4: 0.99}, {"stops_early": False}).plan(View()).num_speculations == 12


def test_doubtful_drafts_end_a_draft() -> None:
    policy = make_policy({4: 0.8})
    for _ in range(150):
        policy.observe(Plan(source="layers", exit_layer=4), result(1, 2, 30.0, (1, 2), confidences=[[0.99, 0.3]]))
    for _ in range(20):
        rates_of(policy).observe_exits({4: (4, 5)})
    stop = policy.plan(View()).stop
    assert stop is not None
    assert stop.rates[-1] > 0.9 > stop.least > stop.rates[0]


def test_matches_are_free_drafts_if_they_hold() -> None:
    policy = make_policy({4: 0.6})
    for _ in range(20):
        policy.plan(View([MATCH]))
        policy.observe(Plan(source="text"), result(4, 4, 19.0, MATCH.tokens[:5]))
    plan = policy.plan(View([MATCH]))
    assert (plan.source, plan.exit_layer) == ("text", 0)
    assert policy.plan(View()).source == "layers"
    for _ in range(150):
        policy.plan(View([MATCH]))
        policy.observe(plan, result(0, 4, 19.0, (99,)))
    assert policy.plan(View([MATCH])).source == "layers"


def test_matches_teach_without_being_used() -> None:
    policy = make_policy({4: 0.6})
    for _ in range(20):
        policy.plan(View([MATCH]))
        policy.observe(Plan(source="none"), result(0, 0, 16.5, MATCH.tokens[:1]))
    assert rates_of(policy).of_match(MATCH.length).value > 0.9


def test_a_match_says_nothing_of_the_later_rounds_of_a_lease() -> None:
    """They are at other places of the text, where what followed the match is not what comes next."""
    policy = make_policy({4: 0.6})
    policy.plan(View([MATCH]))
    for tokens in (MATCH.tokens[:1], (97,), (98,), (99,)):
        policy.observe(Plan(source="none"), result(0, 0, 16.5, tokens))
    assert rates_of(policy).of_match(MATCH.length).long.tried == 1
    assert rates_of(policy).of_match(MATCH.length).long.accepted == 1


def test_matches_in_foreign_texts_have_rates_of_their_own() -> None:
    """Texts that have nothing in common with the present one don't keep it from drafting from itself."""
    policy = make_policy({4: 0.6})
    foreign = Match(length=MATCH.length, tokens=[7], foreign=True)
    for _ in range(20):
        policy.plan(View([MATCH, foreign], samples=[False, False]))
        none = RoundResult(drafts=[(), ()], num_accepted=[0, 0], tokens=[MATCH.tokens[0], 9], seconds=16.5)
        policy.observe(Plan(source="none"), none)
    rates = rates_of(policy)
    assert rates.of_match(MATCH.length, foreign=True).value < 0.2 < 0.9 < rates.of_match(MATCH.length).value


def test_what_lies_beyond_a_foreign_text_was_not_tried() -> None:
    policy = make_policy({4: 0.6})
    policy.plan(View([Match(length=6, tokens=[7, 8], foreign=True)]))
    policy.observe(Plan(source="text"), result(2, 2, 16.5, (7, 8, 9)))
    for further in (False, True):  # of three tokens two were compared: the first, and one behind it
        rate = rates_of(policy).of_match(6, foreign=True, further=further)
        assert (rate.long.accepted, rate.long.tried) == (1, 1)


def test_a_cold_first_round_does_not_make_drafts_from_text_seem_slow() -> None:
    policy = make_policy({4: 0.6})
    for number in range(6):
        policy.plan(View([MATCH]))
        slow = 40.0 if number < COLD_ROUNDS else 1.0
        seconds = slow * policy.times.costs.round(0, 2)
        policy.observe(Plan(source="text", num_speculations=2), result(2, 2, seconds, MATCH.tokens[:3]))
    assert policy.times.correction("text") == pytest.approx(1.0, rel=0.2)


def test_a_text_that_changes_its_kind_changes_the_plan() -> None:
    policy = make_policy({4: 0.95})
    plan = policy.plan(View())
    for _ in range(100):
        policy.observe(plan, result(0, 4, policy.times.costs.round(4, 4)))
    assert rates_of(policy).of_exit(4).overall.value < 0.4
    assert policy.plan(View()).source == "none"


def test_rounds_that_take_longer_than_predicted_correct_the_costs() -> None:
    policy = make_policy({4: 0.8})
    assert policy.plan(View()).source == "layers"
    for _ in range(60):
        steps(policy, [policy.times.costs.step()] * 8)
        for _ in range(COLD_ROUNDS + 2):
            taken = result(4, 4, 3 * policy.times.costs.round(4, 4), range(5))
            policy.observe(Plan(source="layers", exit_layer=4), taken)
    assert policy.times.correction("layers") == pytest.approx(3, rel=1e-3)
    assert policy.times.correction("none") == pytest.approx(1)
    assert policy.plan(View()).source == "none"


def test_a_few_slow_rounds_change_nothing() -> None:
    policy = make_policy({4: 0.8})
    for seconds in (1.0, 1.0, 50.0, 1.0):
        steps(policy, [seconds * policy.times.costs.step()] * 8)
    assert policy.times.correction("none") == 1
    assert policy.times.correction("text") == 1


def test_first_steps_of_a_rest_are_not_timed() -> None:
    policy, step = make_policy({4: 0.8}), make_costs().step()
    for _ in range(9):
        steps(policy, [9 * step] * COLD_STEPS + [2 * step] * TIMED_STEPS)
    steps(policy, [9 * step] * 3)
    assert policy.times.correction("none") == pytest.approx(2)


def follow(policy: AdaptivePolicy, rounds: int) -> list[str]:
    """Where the drafts of each round came from; every draft is accepted, and all takes the time that it should."""
    sources: list[str] = []
    while len(sources) < rounds:
        plan = policy.plan(View())
        if plan.steps:
            steps(policy, [policy.times.seconds("none")] * plan.steps)
            sources += ["none"] * plan.steps
            continue
        drafts = plan.num_speculations
        policy.observe(plan, result(drafts, drafts, policy.seconds(plan)))
        sources.append(plan.source)
    return sources


def test_steps_without_drafts_are_timed_now_and_then() -> None:
    policy = make_policy({4: 0.9})
    policy.times.learn(policy.times.costs)
    sources = follow(policy, 3 * STEPS_EVERY)
    block = COLD_STEPS + TIMED_STEPS
    assert sources[: FIRST_ROUNDS + block + 1] == ["layers"] * FIRST_ROUNDS + ["none"] * block + ["layers"]
    assert sources.count("none") == 3 * block
    assert policy.times.timed("none") == 3
    assert sum(policy.counts.values()) == len(sources)


def plan_steps(policy: AdaptivePolicy, view: View) -> int:
    """Plain steps that are planned at once, after a probe if one is due."""
    plan = policy.plan(view)
    if plan.probe:
        policy.observe(plan, result(0, 0, policy.times.costs.step(), agreement={4: (0.0, 1.0)}))
        plan = policy.plan(view)
    assert plan.source == "none"
    return plan.steps


@pytest.fixture
def long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go on for as long as a policy plans."""
    monkeypatch.setattr(pace_module, "CALL_SECONDS", math.inf)


@pytest.mark.usefixtures("long_calls")
def test_plain_steps_are_planned_more_and_more_at_once_while_nothing_is_better() -> None:
    policy, lengths, view = make_policy({4: 0.05}), [], View(remaining=1000)
    step = policy.times.costs.step()
    for _ in range(9):
        lengths.append(plan_steps(policy, view))
        steps(policy, [2 * step] + [step] * (lengths[-1] - 1))  # the first one after looking at the alternatives
    assert lengths[:3] == [2, 4, 8]
    assert lengths[-1] == MOST_REST
    again = AdaptivePolicy(knowledge=policy.knowledge, exits=policy.exits)
    again.prepare(view)
    assert again.plan(view).steps == FIRST_REST  # the next rows begin as the last ones ended
    policy.pace.is_new_text = False  # otherwise early layers would be tried
    policy.observe(Plan(source="text"), result(4, 4, 19.0))
    assert plan_steps(policy, view) == 2


def test_no_more_steps_are_planned_than_a_call_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the alternatives between two calls costs little."""
    policy, view = make_policy({4: 0.05}), View(remaining=1000)
    step = policy.times.costs.step()
    monkeypatch.setattr(pace_module, "CALL_SECONDS", 7.5 * step)
    for _ in range(9):
        planned = plan_steps(policy, view)
        steps(policy, [2 * step] + [step] * (planned - 1))
    assert planned == 7


@pytest.mark.usefixtures("long_calls")
def test_few_steps_are_planned_at_once_where_looking_costs_little() -> None:
    policy, view = make_policy({4: 0.05}), View(remaining=1000)
    step = policy.times.costs.step()
    for _ in range(9):
        planned = plan_steps(policy, view)
        steps(policy, [1.021 * step] + [step] * (planned - 1))
    assert planned == int(0.021 / LOOK_SHARE)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.3])
def test_drafting_is_tried_where_steps_are_better_and_may_lose_its_share(rate: float) -> None:
    """The nearer drafting comes to steps, the more often; each trial lasts, so that warm rounds are timed."""
    policy = make_policy({4: rate}, {"stops_early": False})
    step, lost, total, sources = policy.times.costs.step(), 0.0, 0.0, list[str]()
    policy.plan(View())
    best = policy._best
    assert best is not None
    gain = best.tokens_per_second * step
    assert gain < 1.0
    while len(sources) < 4000:
        plan = policy.plan(View())
        if plan.steps:
            steps(policy, [step] * plan.steps)
            sources += ["none"] * plan.steps
            total += plan.steps * step
            continue
        seconds = policy.times.costs.round(4, plan.num_speculations) if plan.source == "layers" else step
        tokens = gain * seconds / step if plan.source == "layers" else 1
        total, lost = total + seconds, lost + seconds - tokens * step
        agreement = {4: (5 * rate, 5.0)} if plan.probe else {}
        policy.observe(plan, result(0, plan.num_speculations, seconds, agreement=agreement))
        rates_of(policy).observe_exits({4: (20 * rate, 20)})
        sources.append(plan.source)
    runs = [len(run) for run in "".join(source[0] for source in sources).split("n") if run]
    assert len(runs) > 1
    assert set(runs) <= {TRIAL_ROUNDS, TRIAL_ROUNDS + 1}  # one of them may be a probe, which isn't counted
    assert lost < TRIAL_SHARE * total + TRIAL_ROUNDS * step


def test_near_misses_are_tried_more_often_than_hopeless_drafts() -> None:
    near, hopeless = Pace(), Pace()
    for pace, gain in ((near, 0.95), (hopeless, 0.3)):
        for _ in range(20000):
            if pace.tries(1.0, gain):
                pace.observe_drafts(1.0, layers=True)
            else:
                pace.observe_steps([1.0])
    assert near.since_steps > 3 * hopeless.since_steps > 0


def test_drafting_goes_on_where_it_would_not_begin() -> None:
    """Between the two thresholds, it depends on what the latest rounds did."""
    policy = make_policy({4: 0.8}, {"stops_early": False})
    best, step = policy.plan(View()), policy.times.costs.step()
    between = replace(best, tokens_per_second=(MARGIN + STAYING) / 2 / step)
    policy.pace.is_new_text = False  # otherwise it would be tried
    assert not policy._drafts(between, step)
    policy.observe(best, result(4, 4, policy.seconds(best)))
    assert policy._drafts(between, step)
    policy.observe(Plan(source="none"), result(0, 0, step))
    assert not policy._drafts(between, step)


def test_probes_take_their_share_from_the_first_round_on() -> None:
    policy = AdaptivePolicy(knowledge=Known(make_costs()), exits=(2, 4))
    policy.prepare(View())
    probed, total = 0, 0.0
    for _ in range(2000):
        plan = policy.plan(View())
        if plan.steps:
            steps(policy, [policy.times.costs.step()] * plan.steps)
            total += plan.steps * policy.times.costs.step()
            continue
        seconds, agreement = policy.seconds(plan), {}
        if plan.probe:
            assert plan.probe == (2, 4)
            probed += 1
            seconds += 2
            agreement = {2: (0.0, 1), 4: (1.0, 1)}
        total += seconds
        accepted = plan.num_speculations if plan.exit_layer == 4 else 0
        policy.observe(plan, result(accepted, plan.num_speculations, seconds, agreement=agreement))
        assert 2 * (probed - 1) <= 0.03 * total + 2
    assert probed > 3
    assert rates_of(policy).of_exit(2).overall.value < rates_of(policy).of_exit(4).overall.value


def test_costs_are_measured_where_drafting_might_win_within_their_share_of_the_time() -> None:
    policy = make_policy({4: 0.8})
    follow(policy, 200)
    known = policy.knowledge
    assert isinstance(known, Known)
    assert policy.pace.measuring_seconds == pytest.approx(MEASURING_SHARE * policy.pace.seconds, rel=0.1)
    hopeless = make_policy({4: 0.05})
    follow(hopeless, 200)
    assert hopeless.pace.measuring_seconds == 0


def test_without_exits_there_are_steps() -> None:
    policy = AdaptivePolicy(knowledge=Known(make_costs(num_layers=1)), exits=())
    policy.prepare(View())
    plan = Plan(source="none", steps=2, until_repeated=2, tokens_per_second=pytest.approx(MARGIN / 1.5))
    assert policy.plan(View()) == plan


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 12, 16, 32, 80])
def test_candidates(num_layers: int) -> None:
    exits = candidate_exits(num_layers)
    assert list(exits) == sorted(set(exits))
    assert all(1 <= exit_layer < num_layers for exit_layer in exits)
    assert bool(exits) == (num_layers > 1)


def test_a_fixed_plan_stays() -> None:
    plan = Plan(source="layers", exit_layer=2, num_speculations=3)
    policy = FixedPolicy(fixed=plan)
    policy.prepare(View())
    policy.observe(plan, result(0, 3, 1.0))
    assert policy.plan(View(remaining=1)) is plan


def test_a_fixed_plan_for_drafts_from_the_text_needs_a_match() -> None:
    plan = Plan(source="text", num_speculations=3)
    policy = FixedPolicy(fixed=plan)
    assert policy.plan(View([None, MATCH], samples=(False, False))) is plan
    assert policy.plan(View([None, None], samples=(False, False))) == Plan(source="none")


def test_times_of_rounds_that_are_not_compiled_yet_are_not_learned() -> None:
    policy = make_policy({4: 0.8}, {"stops_early": False})
    plan = policy.plan(View())
    predicted = policy.seconds(plan)
    policy.observe(plan, result(plan.num_speculations, plan.num_speculations, 50 * predicted, settled=False))
    assert policy.seconds(plan) == pytest.approx(predicted)
    assert rates_of(policy).of_exit(4).overall.recent.tried > 0


def test_sources_that_were_never_timed_are_corrected_as_steps_are() -> None:
    """On a GPU a captured step takes a tenth of what its costs say; so will captured rounds with drafts."""
    times = RoundTimes(costs=make_costs())
    for _ in range(5):
        times.observe("none", 0, 0, 0.1 * times.costs.step())
    assert times.seconds("layers", 4, 4) == pytest.approx(0.1 * times.costs.round(4, 4))
    times.observe("layers", 4, 4, 0.3 * times.costs.round(4, 4))
    assert times.seconds("layers", 4, 4) == pytest.approx(0.3 * times.costs.round(4, 4))


def test_plans_are_made_for_the_rows_that_run_at_present() -> None:
    """Of eight rows, a round with drafts takes three times what its costs say; of one row, what they say."""
    policy, eight = make_policy({4: 0.8}), View([None] * 8, samples=[False] * 8)
    plan = policy.plan(View())
    assert plan.source == "layers"
    many = policy.knowledge.times(8, samples=False)
    for _ in range(9):
        many.observe("none", 0, 0, many.costs.step())
        many.observe("layers", 4, 4, 3 * many.costs.round(4, 4))
    assert policy.plan(eight).source == "none"
    assert policy.times is many
    assert replace(policy.plan(View()), lease=plan.lease) == plan
    assert policy.times is policy.knowledge.times(1, samples=False)


def test_costs_are_looked_up_for_the_rows_that_begin() -> None:
    known = Known(make_costs())
    policy = AdaptivePolicy(knowledge=known, exits=(4,))
    policy.prepare(View([None] * 5, samples=[True] * 5))
    policy.plan(View())  # some have left: measuring would take their time
    assert known.recalled == [5]


def test_rows_that_sample_and_rows_that_do_not_have_rates_of_their_own() -> None:
    policy = make_policy({4: 0.9})
    sampling = policy.knowledge.rates(samples=True)
    for _ in range(200):
        sampling.observe_exits({4: (0.5, 5)})
    assert policy.rates_of(4) > 0.85
    policy.plan(View([None] * 4, samples=[False, True, True, True]))
    assert policy.rates_of(4) == pytest.approx((0.9 + 3 * 0.1) / 4, abs=0.02)
    assert policy.times is policy.knowledge.times(4, samples=True)  # drawing takes its time
    before = [policy.knowledge.rates(samples=samples).of_exit(4).overall.long.tried for samples in (False, True)]
    policy.plan(View([None] * 2, samples=[False, True]))
    policy.observe(
        Plan(source="layers", exit_layer=4, num_speculations=2),
        RoundResult(drafts=[(1, 2), (3, 4)], num_accepted=[2, 0], tokens=[5, 6], seconds=30.0),
    )
    after = [policy.knowledge.rates(samples=samples).of_exit(4).overall.long.tried for samples in (False, True)]
    assert [new > old * 0.99 for old, new in zip(before, after, strict=True)] == [True, True]
    assert rates_of(policy).of_exit(4).depths[1].long.accepted == 1
    assert [rate.long.accepted for rate in sampling.of_exit(4).depths] == [0]


def test_matches_teach_the_kind_of_row_that_had_them() -> None:
    policy, other = make_policy({4: 0.6}), Match(length=5, tokens=[7, 7])
    view = View([MATCH, other], samples=[False, True])
    for _ in range(20):
        policy.plan(view)
        none = RoundResult(drafts=[(), ()], num_accepted=[0, 0], tokens=[MATCH.tokens[0], 9], seconds=16.5)
        policy.observe(Plan(source="none"), none)
    assert rates_of(policy).of_match(5).value > 0.9
    assert policy.knowledge.rates(samples=True).of_match(5).value < 0.2


@pytest.mark.parametrize(("asking", "stops"), [(0.0, True), (0.01, True), (20.0, False)])
def test_where_asking_takes_longer_a_fixed_number_of_drafts_may_be_better(asking: float, stops: bool) -> None:
    """As in graphs; where it is free, as in compiled kernels, only thresholds are planned."""
    policy = make_policy({4: 0.8})
    policy.times.learn(replace(policy.times.costs, asking=asking))
    policy.times.observe("none", 0, 0, policy.times.costs.step())
    for _ in range(100):
        rates_of(policy).of_exit(4).observe(8, 8, (0.99,) * 8)
        rates_of(policy).of_exit(4).observe(0, 1, (0.1,))
    plan = policy.plan(View())
    assert (plan.source, plan.exit_layer) == ("layers", 4)
    assert (plan.stop is not None) == stops


def test_what_rounds_teach_is_the_time_without_asking() -> None:
    policy = make_policy({4: 0.8})
    policy.times.learn(replace(policy.times.costs, asking=2.0))
    policy.times.observe("none", 0, 0, policy.times.costs.step())
    stop = StopRule(rates=(0.9,) * CONFIDENCE_CLASSES, least=0.1)
    plan = Plan(source="layers", exit_layer=4, num_speculations=3, stop=stop)
    seconds = policy.times.seconds("layers", 4, 3) + 3 * 2.0
    for _ in range(20):
        policy.observe(plan, result(3, 3, seconds, confidences=[(0.9,) * 3]))
    assert policy.times.correction("layers") == pytest.approx(1.0, rel=0.01)


def test_a_lease_covers_the_rounds_that_would_be_planned_alike() -> None:
    """Until the policy would look at what it has learned; with the same seconds and drafts, nothing else is decided."""
    policy = make_policy({4: 0.9})
    for _ in range(40):
        plan = policy.plan(View())
        if plan.steps or plan.probe:
            follow(policy, 1)
            continue
        assert plan.until_repeated
        assert 1 <= plan.lease <= MOST_KEPT
        for _ in range(plan.lease):
            again = policy.plan(View())
            assert replace(again, lease=plan.lease, probe=(), until_repeated=plan.until_repeated) == plan
            drafts = again.num_speculations
            taken = result(drafts, drafts, policy.seconds(again), range(drafts + 1), confidences=[[0.9] * drafts])
            policy.observe(again, taken)
    assert policy.counts["layers", 4] > 40


def test_a_lease_ends_where_the_text_would_draft_better() -> None:
    """A match that promises less than early layers doesn't end it, once that is known."""
    policy = make_policy({4: 0.6})
    assert (policy.plan(View()).lease, policy.plan(View()).until_repeated) == (PLAN_EVERY, REPEATED[0])
    for length, accepted in zip(REPEATED, (0, 0, 12, 12), strict=True):
        match = Match(length=length, tokens=list(range(1, 13)))
        for _ in range(20):
            policy.plan(View([match]))
            policy.observe(Plan(source="text"), result(accepted, 12, 21.0, [*range(1, accepted + 1), 99]))
    for view in (View(), View([Match(length=REPEATED[1], tokens=[5])]), View(remaining=5)):
        policy._rounds, policy._stale = policy._rounds + PLAN_EVERY, True
        policy.pace.observe_probe(0.0)  # none is due
        plan = policy.plan(view)
        assert (plan.source, plan.until_repeated) == ("layers", REPEATED[2])
        assert plan.lease > 1


def test_a_trial_leaves_the_rest_after_it_as_long_as_it_was() -> None:
    pace = Pace(rest=64, trial=3)
    for _ in range(3):
        pace.observe_drafts(1.0, layers=True)
    assert (pace.rest, pace.trial) == (64, 0)
    pace.observe_drafts(1.0, layers=True)
    assert pace.rest == 0


def test_what_was_planned_is_kept_for_the_next_text_until_more_is_known() -> None:
    policy = make_policy({4: 0.05})
    policy.plan(View())
    kept = policy.pace.best
    assert kept is not None

    def next_policy(**options: Any) -> AdaptivePolicy:
        again = AdaptivePolicy(knowledge=policy.knowledge, exits=policy.exits, **options)
        again.plan(View())
        return again

    assert next_policy().pace.best is kept
    assert next_policy(most_drafts=2).pace.best is not kept
    policy.observe(Plan(source="layers", exit_layer=4, num_speculations=1), result(0, 1, 1.0, confidences=[[0.5]]))
    assert policy.pace.best is None


def test_a_rest_ends_where_the_text_is_expected_to_draft() -> None:
    """Short matches that never hold aren't looked for any more; longer ones are."""
    policy = make_policy({4: 0.05})
    assert policy._worth_watching() == 2
    for _ in range(200):
        rates_of(policy).observe_match(2, 0, 4)
    policy._watched_at = -PLAN_EVERY
    assert policy._worth_watching() == 4
    for length in (4, 8, 16):
        for _ in range(200):
            rates_of(policy).observe_match(length, 0, 4)
    policy._watched_at = -PLAN_EVERY
    assert policy._worth_watching() == 0


def test_early_layers_are_tried_once_on_a_new_text_where_they_come_near_to_steps() -> None:
    near, far = Pace(), Pace()
    for pace in (near, far):
        pace.begin_text()
    assert near.tries(1.0, 0.95)
    assert not far.tries(1.0, 0.5)
    near.trial = 0
    assert not near.tries(1.0, 0.95)
