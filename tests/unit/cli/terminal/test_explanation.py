"""What is said of a model that gains something or nothing, and why."""

from policies import Known, View, make_costs, rates_of, result, steps

from layerskip.cli.terminal.explanation import explain
from layerskip.decoding.adaptive.pace import COLD_STEPS, TIMED_STEPS
from layerskip.decoding.adaptive.policy import FIRST_ROUNDS, AdaptivePolicy
from layerskip.decoding.policy import Plan


def policy_of(rates: dict[int, float], *, row: float = 0.05, head: float = 0.5) -> AdaptivePolicy:
    policy = AdaptivePolicy(knowledge=Known(make_costs(row=row, fixed=head)), exits=tuple(rates))
    policy.prepare(View())
    for exit_layer, rate in rates.items():
        for _ in range(200):
            rates_of(policy).observe_exits({exit_layer: (5 * rate, 5)})
    return policy


def follow(policy: AdaptivePolicy, rounds: int = 8) -> Plan:
    """The last of some plans; every draft is accepted, and all takes the time that it should."""
    while rounds:
        plan = policy.plan(View())
        if plan.steps:
            steps(policy, [policy.times.seconds("none")] * plan.steps)
            continue
        policy.observe(plan, result(plan.num_speculations, plan.num_speculations, policy.seconds(plan)))
        rounds -= 1
    return plan


def test_a_model_that_gains() -> None:
    policy = policy_of({4: 0.9, 8: 0.92})
    assert follow(policy, FIRST_ROUNDS + 2).source == "layers"
    found = explain(policy)
    assert found.rounds == {"layers": FIRST_ROUNDS + 2, "text": 0, "none": COLD_STEPS + TIMED_STEPS}
    assert len(found.reasons) == 1
    assert "mostly 4 of 16" in found.reasons[0]
    best = found.exits[0]
    assert best.speedup > 1.5
    assert best.needed < 0.5 < best.acceptance
    assert best.rounds == FIRST_ROUNDS + 2


def test_a_model_without_early_exits() -> None:
    policy = policy_of({4: 0.02, 8: 0.05})
    assert follow(policy).source == "none"
    text = " ".join(explain(policy).reasons)
    rounds = sum(policy.counts.values())
    assert rounds > 8
    assert f"{rounds} of {rounds} rounds had no drafts" in text
    assert "wasn't trained for early exit" in text
    assert "head" not in text


def test_a_large_head() -> None:
    policy = policy_of({2: 0.4}, head=12.0)
    assert "The head takes 86% of a draft's time" in " ".join(explain(policy).reasons)


def test_rows_that_are_not_free() -> None:
    policy = policy_of({4: 0.7}, row=0.8)
    follow(policy)
    found = explain(policy)
    assert found.verification_ratio > 2
    assert "A smaller batch gains more" in " ".join(found.reasons)


def test_a_single_layer() -> None:
    assert "single layer" in explain(policy_of({})).reasons[0]
