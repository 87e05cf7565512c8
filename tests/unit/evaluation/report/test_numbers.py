"""Numbers of reports in words, and those at the axes of plots."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from layerskip.evaluation.report.numbers import interval, memory, options, percent, ratio, seconds, significant
from layerskip.evaluation.report.plots import decades, ticks


@pytest.mark.parametrize(
    ("form", "values"),
    [
        (
            significant,
            {
                0: "0",
                9.999: "10.0",
                99.96: "100",
                1234.4: "1,234",
                0.01234: "0.0123",
                -4.567: "-4.57",
                1e-12: "1.00e-12",
            },
        ),
        (ratio, {2.314: "2.31×", math.nan: "–"}),
        (percent, {0.7126: "71.3%", None: "–"}),
        (seconds, {0.00085: "850 µs", 0.0123: "12.3 ms", 4.561: "4.56 s", 75.4: "1 min 15 s", 3725.0: "1 h 02 min"}),
        (memory, {512: "512 B", 1536: "1.50 KiB", 5 * 2**40: "5,120 GiB"}),
    ],
)
def test_numbers_in_words(form: Callable[[Any], str], values: dict[Any, str]) -> None:
    assert {value: form(value) for value in values} == values
    assert form("text") == form(True) == form(None) == interval(None, 1.0) == "–"


def test_ticks_cover_what_they_label() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert decades(19.5, 1250) == [10, 20, 50, 100, 200, 500, 1000, 2000]
    for low, high in ((3.0, 3.0), (0.0, 0.0), (-5.0, 17.3), (1e-9, 2e-9), (99.0, 101.0), (0.0, 1e12)):
        found = ticks(low, high)
        assert found[0] <= low <= high <= found[-1] * (1 + 1e-9)
        assert 2 <= len(found) <= 9
    for low, high in ((1.0, 1.0), (0.3, 1e6), (5.0, 5.1)):
        assert decades(low, high)[0] <= low <= high <= decades(low, high)[-1]


def test_options_in_words() -> None:
    named = {"generation_strategy": "self_speculative", "exit_layer": 4, "num_speculations": 6, "seed": None}
    assert options({**named, "ngram_size": [2, 3]}) == "exit 4, drafts 6, ngram_size 2, 3"
    assert options(None) == ""
