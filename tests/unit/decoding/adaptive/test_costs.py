"""Costs, measured with a small network."""

import math

import pytest

from layerskip.decoding.adaptive.costs import MOST_QUERIES, CallTimer, estimate_costs, finish, measure_costs
from layerskip.language_model import LanguageModel


@pytest.mark.parametrize("num_rows", [1, 3])
def test_all_that_a_round_needs_is_measured(text_lm: LanguageModel, num_rows: int) -> None:
    decoder = text_lm.decoder
    calls = decoder.layer_calls
    costs = measure_costs(decoder, num_rows)
    assert decoder.layer_calls == calls  # not counted as work
    assert costs.num_layers == decoder.num_layers
    assert len(costs.layer) == len(costs.fixed) == MOST_QUERIES
    assert costs.most_drafts == MOST_QUERIES - 1
    values = (costs.step(), costs.round(1, 4), costs.round(0, 4), costs.drafting(2, 3), costs.verification(2, 100))
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert costs.verification(0, 0) == costs.step()


def test_slow_calls_are_timed_once(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.decoding.adaptive.costs.SLOW_SECONDS", 0.0)
    timer, made = CallTimer(text_lm.decoder, 1, 4), []
    finish(timer._time(lambda: made.append(1), 50))
    assert len(made) == 2


def test_estimates_compare_calls_as_measurements_do(text_lm: LanguageModel) -> None:
    costs = estimate_costs(text_lm.decoder)
    assert costs.num_layers == text_lm.decoder.num_layers
    assert costs.most_drafts == MOST_QUERIES - 1
    assert costs.step() < costs.verification(0, 4) < 3 * costs.step()
    assert 0 < costs.drafting(1, 1) < costs.drafting(2, 1) < costs.drafting(2, 4)
