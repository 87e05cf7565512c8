"""Thresholds of drafting, from how likely drafts of each confidence are accepted and what their time is worth."""

import random

import pytest

from layerskip.decoding.adaptive.outlook import Classes, Outlook, best_outlook

CLASSES = Classes(rates=(0.05, 0.3, 0.6, 0.95), shares=(0.2, 0.2, 0.2, 0.4))


def simulate(classes: Classes, least: float, kept: float, most: int, num_rows: int, rounds: int = 40_000) -> Outlook:
    """The means over many rounds."""
    pick, sums = random.Random(0), dict.fromkeys(("accepted", "verified", "drawn", "passes"), 0.0)
    for _ in range(rounds):
        passes = 0
        for _ in range(num_rows):
            chance, holds = 1.0, True
            for depth in range(most):
                rate = pick.choices(classes.rates, classes.shares)[0]
                sums["drawn"] += 1
                passes = max(passes, depth + 1)
                chance *= rate
                if chance < kept:
                    break
                sums["verified"] += 1
                holds = holds and pick.random() < rate
                sums["accepted"] += holds
                if chance < least:
                    break
        sums["passes"] += num_rows * passes
    means = {name: value / rounds / num_rows for name, value in sums.items()}
    return Outlook(least=least, kept=kept, **means)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("num_rows", [1, 8])
def test_what_is_expected_is_what_happens(kept: float, num_rows: int) -> None:
    expected, found = CLASSES.follow(0.5, kept, 6, num_rows), simulate(CLASSES, 0.5, kept, 6, num_rows, 4_000)
    for name in ("accepted", "verified", "drawn"):
        assert getattr(expected, name) == pytest.approx(getattr(found, name), rel=0.2, abs=0.05), name
    assert expected.passes == pytest.approx(found.passes, rel=0.35)


def make(verify: float, draw: float, *, fixed: float = 1.0, gives_up: bool = True, num_rows: int = 1) -> Outlook:
    """The best thresholds where a step takes `fixed`."""
    return best_outlook(
        CLASSES,
        lambda outlook: fixed + verify * outlook.verified + draw * outlook.drawn,
        lambda _: (draw, verify),
        most=8,
        num_rows=num_rows,
        speed=1 / fixed,
        gives_up=gives_up,
    )


def test_dear_verification_is_for_sure_drafts_only() -> None:
    cheap, dear = make(0.02, 0.02), make(0.7, 0.02)
    assert cheap.kept < 0.1 < 0.6 < dear.kept
    assert cheap.verified > dear.verified > 0
    assert cheap.tokens_per_second > dear.tokens_per_second > 1.0


def test_where_a_token_costs_as_much_as_a_step_nothing_is_gained() -> None:
    found = make(1.0, 0.02)
    assert found.tokens_per_second < 1.0
    assert (found.drawn, found.verified) == (1.0, 1.0)  # what a trial would do


def test_where_drafts_may_not_be_given_up_they_are_all_verified() -> None:
    found = make(0.2, 0.02, gives_up=False)
    assert found.kept == 0.0
    assert found.verified == pytest.approx(found.drawn)
    assert found.tokens_per_second < make(0.2, 0.02).tokens_per_second


@pytest.mark.parametrize("gives_up", [True, False])
@pytest.mark.parametrize(("verify", "draw"), [(0.05, 0.05), (0.3, 0.05), (0.05, 0.3), (0.5, 0.01)])
def test_no_other_thresholds_promise_much_more(verify: float, draw: float, gives_up: bool) -> None:
    found, best = make(verify, draw, gives_up=gives_up).tokens_per_second, 0.0
    for kept in [i / 20 for i in range(20)] if gives_up else [0.0]:
        for least in [i / 20 for i in range(21)]:
            other = CLASSES.follow(least, kept, 8, 1)
            best = max(best, (1 + other.accepted) / (1.0 + verify * other.verified + draw * other.drawn))
    assert found > 0.97 * best
