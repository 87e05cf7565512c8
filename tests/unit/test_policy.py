"""What is planned for a round, from given costs and given acceptance."""

import pytest

from layerskip.decoding.costs import Costs
from layerskip.decoding.policy import (
    Acceptance,
    AdaptivePolicy,
    FixedPolicy,
    Plan,
    candidate_exits,
    expected_tokens,
)

NONE: tuple[int, ...] = (0,)


def make_costs(*, row: float = 0.05, fixed: float = 0.5, num_layers: int = 16) -> Costs:
    """A layer takes 1, each further token `row` more; all else of a call `fixed`."""
    return Costs(
        num_layers=num_layers,
        layer=tuple(1 + row * n for n in range(13)),
        fixed=(fixed,) * 13,
        without_head=0.1,
    )


def make_policy(rates: dict[int, float], **costs: float) -> AdaptivePolicy:
    policy = AdaptivePolicy(costs=make_costs(**costs), exits=tuple(rates))  # type: ignore[arg-type]
    for exit_layer, rate in rates.items():
        policy.acceptance[exit_layer] = Acceptance(accepted=rate * 100, tried=100)
    return policy


def test_costs_of_steps_and_rounds() -> None:
    costs = make_costs()
    assert costs.step() == 16.5
    # 5 passes of 4 layers, 4 heads, one pass without; then 12 layers and a head over 5 tokens
    assert costs.round(4, 4) == pytest.approx(5 * 4 + 4 * 0.5 + 0.1 + 12 * 1.2 + 0.5)
    assert costs.round(0, 4) == pytest.approx(16 * 1.2 + 0.5)
    assert costs.round(0, 0) == costs.step()


def test_expected_tokens() -> None:
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == 1.75


def test_the_plan_is_the_best_of_the_grid() -> None:
    policy = make_policy({1: 0.3, 4: 0.8, 8: 0.9})
    plan = policy.plan(NONE, 100)
    grid = {
        (exit_layer, drafts): expected_tokens(rate, drafts) / policy.costs.round(exit_layer, drafts)
        for exit_layer, rate in {1: 0.3, 4: 0.8, 8: 0.9}.items()
        for drafts in range(1, 13)
    }
    assert (plan.drafter, plan.exit_layer, plan.num_speculations) == ("early_exit", *max(grid, key=grid.__getitem__))
    assert plan.tokens_per_second == max(grid.values())


def test_exits_that_never_agree_are_left_alone() -> None:
    assert make_policy({1: 0.05, 4: 0.05, 8: 0.1}).plan(NONE, 100).drafter == "none"


def test_rows_that_cost_as_much_as_steps_are_not_worth_it() -> None:
    assert make_policy({4: 0.8}, row=1.0).plan(NONE, 100).drafter == "none"


def test_no_more_drafts_than_may_be_written() -> None:
    policy = make_policy({4: 0.99})
    assert policy.plan(NONE, 3).num_speculations == 2
    assert policy.plan(NONE, 1).drafter == "none"
    assert policy.plan(NONE, 100).num_speculations == 12


def test_matches_are_free_drafts() -> None:
    policy = make_policy({4: 0.6})
    for _ in range(10):
        policy.observe(Plan(drafter="ngram", num_speculations=4), [(4, 4)], (5,))
    plan = policy.plan((5,), 100)
    assert (plan.drafter, plan.exit_layer) == ("ngram", 0)
    assert policy.plan((0,), 100).drafter == "early_exit"
    for _ in range(40):
        policy.observe(plan, [(0, 4)], (5,))
    assert policy.plan((5,), 100).drafter == "early_exit"


def test_learning_stops_at_the_first_rejected_draft() -> None:
    acceptance = AdaptivePolicy(costs=make_costs(), exits=(4,)).acceptance[4]
    tried = acceptance.tried
    policy = AdaptivePolicy(costs=make_costs(), exits=(4,))
    policy.observe(Plan(drafter="early_exit", exit_layer=4, num_speculations=8), [(2, 8)], (0,))
    assert policy.acceptance[4].tried == pytest.approx(tried * 0.97**3 + 3)
    assert policy.acceptance[4].accepted == pytest.approx(acceptance.accepted * 0.97**3 + 2)


def test_recent_rounds_count_more() -> None:
    policy = make_policy({4: 0.95})
    for _ in range(100):
        policy.observe(Plan(drafter="early_exit", exit_layer=4, num_speculations=4), [(0, 4)], (0,))
    assert policy.acceptance[4].rate < 0.4
    assert policy.plan(NONE, 100).drafter == "none"


def test_probes_teach_every_exit() -> None:
    policy = AdaptivePolicy(costs=make_costs(), exits=(2, 4))
    assert policy.probes
    policy.observe(Plan(drafter="none"), [(0, 0)], (0,))
    assert not policy.probes
    for _ in range(10):
        policy.observe_exits({2: (0, 4), 4: (4, 4)})
    assert policy.acceptance[2].rate < 0.3
    assert policy.acceptance[4].rate > 0.9


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 12, 16, 32, 80])
def test_candidates(num_layers: int) -> None:
    exits = candidate_exits(num_layers)
    assert list(exits) == sorted(set(exits))
    assert all(1 <= exit_layer < num_layers for exit_layer in exits)
    assert bool(exits) == (num_layers > 1)


def test_a_fixed_plan_stays() -> None:
    plan = Plan(drafter="early_exit", exit_layer=2, num_speculations=3)
    policy = FixedPolicy(fixed=plan)
    policy.observe(plan, [(0, 3)], (0,))
    policy.observe_exits({})
    assert policy.plan((0,), 1) is plan
    assert not policy.probes
