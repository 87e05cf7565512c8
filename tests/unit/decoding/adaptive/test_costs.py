"""Costs, measured with a small network."""

import math

import pytest

from layerskip.decoding.adaptive.call_timer import CallTimer, finish
from layerskip.decoding.adaptive.costs import (
    MEASURED_TOKENS,
    MOST_QUERIES,
    Costs,
    estimate_costs,
    measure_costs,
)
from layerskip.language_model import LanguageModel


@pytest.mark.parametrize("num_rows", [1, 3])
def test_all_that_a_round_needs_is_measured(text_lm: LanguageModel, num_rows: int) -> None:
    decoder = text_lm.decoder
    calls = decoder.layer_calls
    costs = measure_costs(decoder, num_rows)
    assert decoder.layer_calls == calls  # not counted as work
    assert costs.num_layers == decoder.num_layers
    known = MEASURED_TOKENS[-1] if costs.ragged and num_rows == 1 else MOST_QUERIES
    assert len(costs.layer) == len(costs.fixed) == known
    assert costs.most_drafts == MOST_QUERIES - 1
    values = (costs.step(), costs.round(1, 4), costs.round(0, 4), costs.drafting(2, 3), costs.verification(2, 100))
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert costs.verification(0, 0) == costs.step()


def test_slow_calls_are_timed_once(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.decoding.adaptive.call_timer.SLOW_SECONDS", 0.0)
    timer, made = CallTimer(text_lm.decoder, 1, 4), []
    finish(timer._time(lambda: made.append(1), 50))
    assert len(made) == 2


def test_estimates_compare_calls_as_measurements_do(text_lm: LanguageModel) -> None:
    costs = estimate_costs(text_lm.decoder)
    assert costs.num_layers == text_lm.decoder.num_layers
    assert costs.most_drafts == MOST_QUERIES - 1
    assert costs.step() < costs.verification(0, 4) < 3 * costs.step()
    assert 0 < costs.drafting(1, 1) < costs.drafting(2, 1) < costs.drafting(2, 4)


def ragged_costs() -> Costs:
    """Of one row: a layer takes 1 and 0.1 more for each further token, a head 2 and 1 more."""
    return Costs(
        num_layers=10,
        layer=tuple(1 + 0.1 * n for n in range(33)),
        fixed=tuple(2.0 + n for n in range(33)),
        draft_layer=1.0,
        draft_head=0.5,
        draft_fixed=0.25,
        adapters={2: 3.0},
        ragged=True,
        draft_row=0.5,
    )


@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_costs_of_rows_follow_from_those_of_tokens(num_rows: int) -> None:
    """Also beyond what was measured, and for rows with different numbers of drafts."""
    costs = ragged_costs().for_rows(num_rows)
    for total in (0, 1, 3, num_rows, 3 * num_rows + 1, 12 * num_rows):
        tokens = num_rows + total
        expected = (10 - 2) * (1 + 0.1 * (tokens - 1)) + 2 + tokens - 1
        assert costs.verification(2, total / num_rows) == pytest.approx(expected)
    assert costs.most_drafts == MOST_QUERIES - 1


def test_rows_that_have_their_drafts_drop_out_of_drafting() -> None:
    costs = ragged_costs().for_rows(4)
    whole = 1 + 3 * 0.5  # a pass of four rows, in passes of one
    # Four rows draft 3, 1, 1 and 1 tokens: passes of 4, 4, 1 and 1 rows, of which the last drafts of rows are the last.
    tokens = [4, 4, 1, 1]
    layers = sum(2 * (1 + 0.5 * (rows - 1)) for rows in tokens)
    heads = sum(3.0 * (1 + 0.5 * (rows - 1)) for rows in (4, 1, 1))
    assert costs.drafting(2, 3, 6 / 4) == pytest.approx(0.25 + layers + heads)
    assert costs.drafting(2, 3) == pytest.approx(0.25 + 4 * 2 * whole + 3 * 3 * whole)
    assert costs.round(2, 1.0, drawn=6 / 4, most=3) == pytest.approx(0.25 + layers + heads + costs.verification(2, 1.0))
