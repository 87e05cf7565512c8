"""How drafts are shared out among rows: a pure function of chances and costs."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.decoding.adaptive.budget import budget_of, share_out


def linear(fixed: float, token: float, step: float = 0.0) -> Callable[[int, int], float]:
    """A round takes `fixed`, `token` for each draft, and `step` for each of the row that has most."""
    return lambda total, longest: fixed + token * total + step * longest


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], Callable[[int, int], float]]:
    rate = st.floats(0.01, 1.0)
    rows = draw(st.lists(st.lists(rate, max_size=6), min_size=1, max_size=6))
    chances = [list(itertools.accumulate(rates, lambda a, b: a * b)) for rates in rows]
    token, step = draw(st.floats(0.0, 2.0)), draw(st.floats(0.0, 2.0))
    corner, cheap = draw(st.integers(0, 12)), draw(st.floats(0.0, 1.0))  # the first tokens may cost less

    def seconds(total: int, longest: int) -> float:
        return 1.0 + token * (cheap * min(total, corner) + max(0, total - corner)) + step * longest

    return chances, seconds


@given(cases())
def test_no_uniform_number_of_drafts_is_better(case: tuple[list[list[float]], Callable[[int, int], float]]) -> None:
    chances, seconds = case
    found = share_out(chances, seconds)
    assert found == budget_of(chances, found.lengths, seconds)
    assert all(length <= len(each) for length, each in zip(found.lengths, chances, strict=True))
    for length in range(8):
        same = budget_of(chances, tuple(min(length, len(each)) for each in chances), seconds)
        assert found.speed >= same.speed * (1 - 1e-12)


@pytest.mark.parametrize("token", [0.05, 0.2, 0.5, 0.9])
def test_what_is_found_is_the_best_of_all_where_only_tokens_cost(token: float) -> None:
    chances, seconds = [[0.9, 0.7, 0.6], [0.5, 0.1, 0.05], [0.95, 0.94, 0.3]], linear(1.0, token)
    every = itertools.product(range(4), repeat=3)
    best = max((budget_of(chances, lengths, seconds) for lengths in every), key=lambda budget: budget.speed)
    assert share_out(chances, seconds).speed == pytest.approx(best.speed)


def test_easy_rows_get_more_than_hard_ones() -> None:
    chances: Sequence[Sequence[float]] = [[0.95**k for k in range(1, 9)], [0.3**k for k in range(1, 9)], []]
    lengths = share_out(chances, linear(3.0, 0.5)).lengths
    assert lengths[0] > lengths[1] >= 0
    assert lengths[2] == 0


def test_a_busy_machine_gets_plain_steps() -> None:
    chances = [[0.9**k for k in range(1, 9)]] * 16
    saturated = share_out(
        chances, lambda total, _: (16 + total) / 16
    )  # another token costs as much as one of the first
    assert saturated.lengths == (0,) * 16
    assert saturated.tokens == 16.0
    free = share_out(chances, lambda total, _: 1.0)
    assert free.lengths == (8,) * 16


def test_costs_with_a_step_are_looked_beyond() -> None:
    """The first draft doesn't pay, but once it is there, others cost nothing."""
    chances = [[0.9, 0.85, 0.8, 0.75]]
    assert share_out(chances, lambda total, _: 1.0 + (1.5 if total else 0.0)).lengths == (4,)
    assert share_out(chances, lambda total, _: 1.0 + (9.0 if total else 0.0)).lengths == (0,)
