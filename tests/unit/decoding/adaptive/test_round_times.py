"""Predicted seconds of rounds on a machine whose speed changes."""

import pytest
from policies import make_costs

from layerskip.decoding.adaptive.round_times import COMPARED_ROUNDS, KNOWN_ROUNDS, PRESENT_ROUNDS, RoundTimes

LAYERS = ("layers", 4, 4)


def observe(times: RoundTimes, source: str, ratio: float, rounds: int, drafts: int = 4) -> None:
    """Rounds that take `ratio` times as long as their costs say."""
    exit_layer, drafts = (4, drafts) if source == "layers" else (0, 0)
    for _ in range(rounds):
        times.observe(source, exit_layer, drafts, ratio * times.costs.round(exit_layer, drafts))  # type: ignore[arg-type]


def relative(times: RoundTimes) -> float:
    """How much more rounds with drafts take than costs say, as a ratio to steps."""
    return times.correction("layers") / times.correction("none")


def test_a_machine_that_becomes_slower_is_slower_for_all_kinds() -> None:
    times = RoundTimes(costs=make_costs())
    observe(times, "none", 1.0, 20)
    observe(times, "layers", 1.2, 20)
    assert relative(times) == pytest.approx(1.2)
    observe(times, "layers", 3.0, 20)  # all else is 2.5 times as slow now, though nobody has looked
    assert times.seconds(*LAYERS) == pytest.approx(3.0 * times.costs.round(4, 4))  # type: ignore[arg-type]
    assert times.seconds("none") == pytest.approx(2.5 * times.costs.step())
    assert relative(times) == pytest.approx(1.2)


def test_rounds_are_compared_with_those_right_before_them() -> None:
    times = RoundTimes(costs=make_costs())
    observe(times, "none", 1.0, 20)
    observe(times, "layers", 1.2, 20)
    for _ in range(COMPARED_ROUNDS):  # drafts have become slower, and steps have not
        observe(times, "none", 1.0, PRESENT_ROUNDS)
        observe(times, "layers", 2.0, PRESENT_ROUNDS)
    assert relative(times) == pytest.approx(2.0, rel=0.05)


def test_a_number_of_drafts_that_was_timed_is_corrected_by_itself() -> None:
    times = RoundTimes(costs=make_costs())
    observe(times, "none", 1.0, 9)
    observe(times, "layers", 1.0, 9, drafts=1)
    before = times.of_lengths("layers", 4)
    observe(times, "layers", 1.5, KNOWN_ROUNDS, drafts=3)
    after = times.of_lengths("layers", 4)
    observe(times, "layers", 1.0, 9, drafts=1)
    settled = times.of_lengths("layers", 4)
    assert after[3] > 1.2 * before[3]
    assert settled[3] == pytest.approx(1.5 * before[3], rel=0.05)
    assert settled[1] == pytest.approx(before[1], rel=0.05)
    assert settled[3] == times.seconds("layers", 4, 3)


def test_means_of_drafts_lie_between_the_numbers_that_were_timed() -> None:
    """A small difference in drafts must not seem to make a large one in seconds, or it alone would decide."""
    times = RoundTimes(costs=make_costs())
    observe(times, "layers", 1.0, 20, drafts=1)
    observe(times, "layers", 1.4, 20, drafts=2)
    below, above = times.correction("layers", 1), times.correction("layers", 2)
    assert above > 1.2 * below
    assert times.correction("layers", 1.25) == pytest.approx(below + 0.25 * (above - below))
    assert times.correction("layers", 1.5 - 1e-6) == pytest.approx(times.correction("layers", 1.5 + 1e-6), rel=1e-4)
