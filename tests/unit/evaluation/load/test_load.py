"""Arrivals, prompts, bodies of requests, figures."""

import math
import random
from itertools import islice
from statistics import fmean, pstdev, quantiles
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.load.arrivals import poisson_gaps, synthetic_prompt
from layerskip.evaluation.load.client import base_address
from layerskip.evaluation.load.config import LoadConfig, make_body, parse_words, path_of
from layerskip.evaluation.load.figures import (
    inter_token,
    percentile,
    span_of,
    spread,
    summarize,
    time_per_token,
    token_gaps,
)


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_gaps_are_exponential(rate: float) -> None:
    gaps = list(islice(poisson_gaps(rate, 1), 20_000))
    assert fmean(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert pstdev(gaps) == pytest.approx(1 / rate, rel=0.04)  # as large as the mean
    # The share of gaps longer than a time falls exponentially.
    for factor in (0.5, 1.0, 2.0):
        share = sum(gap > factor / rate for gap in gaps) / len(gaps)
        assert share == pytest.approx(math.exp(-factor), abs=0.012)


def test_arrivals_in_a_second_have_the_variance_of_a_poisson_process() -> None:
    due, counts = 0.0, [0] * 2000
    for gap in poisson_gaps(10.0, 3):
        due += gap
        if due >= len(counts):
            break
        counts[int(due)] += 1
    assert fmean(counts) == pytest.approx(10, rel=0.03)
    assert pstdev(counts) ** 2 == pytest.approx(10, rel=0.12)


def test_a_seed_gives_the_same_arrivals_and_prompts() -> None:
    assert list(islice(poisson_gaps(2.0, 5), 9)) == list(islice(poisson_gaps(2.0, 5), 9))
    assert next(poisson_gaps(2.0, 5)) != next(poisson_gaps(2.0, 6))
    assert synthetic_prompt(8, 30, 0, 4) == synthetic_prompt(8, 30, 0, 4)
    assert len({synthetic_prompt(8, 8, seed, index) for seed in range(3) for index in range(-2, 30)}) == 96
    lengths = {len(synthetic_prompt(3, 6, 0, index).split()) for index in range(100)}
    assert lengths == {3, 4, 5, 6}


@pytest.mark.parametrize("number", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_those_of_the_standard_library(number: int) -> None:
    values = sorted(random.Random(number).random() for _ in range(number))
    assert percentile(values, 0) == values[0]
    assert percentile(values, 100) == values[-1]
    if number > 1:
        cuts = quantiles(values, n=100, method="inclusive")
        assert [percentile(values, percent) for percent in range(1, 100)] == pytest.approx(cuts)


def test_spread() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert found == {"mean": 2.5, "p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97, "max": 4.0, "count": 4}
    assert spread([])["p50"] is None


def sample(**fields: Any) -> dict[str, Any]:
    usual = {"attempt": 1, "start": 0.0, "seconds": 1.0, "first": 0.2, "gaps": [], "piece_tokens": None, "tokens": None}
    return {**usual, "prompt_tokens": None, "speculation": None, "error": None, **fields}


def test_the_time_of_a_piece_is_shared_among_its_tokens() -> None:
    told = sample(gaps=[0.3, 0.1], piece_tokens=[2, 3, 1], tokens=6)
    assert token_gaps(told) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert time_per_token(told) == pytest.approx(0.1)
    untold = sample(gaps=[0.3, 0.1], tokens=6)
    assert token_gaps(untold) == []
    assert time_per_token(untold) == pytest.approx(0.08)
    assert inter_token([told, told]) == pytest.approx([0.1] * 8)
    assert inter_token([told, untold]) == []  # what is known of some answers only would be of the slower ones
    assert time_per_token(sample()) is None


def test_time_between_attempts_does_not_count() -> None:
    samples = [sample(start=0.5, seconds=1.0), sample(start=1.0, seconds=2.0), sample(attempt=2, seconds=4.0)]
    assert span_of(samples) == pytest.approx(2.5 + 4.0)
    assert span_of([]) == 0


def test_summary() -> None:
    told = {"num_drafts": 2, "num_draft_tokens": 6, "num_accepted_tokens": 3}
    samples = [
        sample(tokens=4, gaps=[0.3], speculation={**told, "acceptance_histogram": [2, 1], "draft_histogram": [2, 2]}),
        sample(start=1.0, gaps=[0.1, 0.1], speculation={**told, "acceptance_histogram": [1], "draft_histogram": [2]}),
        sample(start=2.0, first=None, error={"kind": "HTTP 503", "message": "busy"}),
        sample(start=3.0, first=None, error={"kind": "HTTP 503", "message": "full"}),
    ]
    results = summarize(samples)
    assert (results["requests"], results["answered"], results["seconds"]) == (4, 2, 4.0)
    assert results["errors"] == [{"kind": "HTTP 503", "count": 2, "example": "busy"}]
    assert results["output_tokens"] == 4 + 3
    assert results["output_tokens_per_second"] == pytest.approx(7 / 4)
    assert results["tokens_counted_by"] == "both"
    assert results["time_to_first_token_s"]["count"] == 2
    assert results["speculation"]["draft_acceptance_rate"] == 0.5
    assert results["speculation"]["mean_acceptance_length"] == 2.5
    assert results["speculation"]["accepted_by_position"] == [3, 1]
    assert results["speculation"]["drafted_by_position"] == [4, 2]
    assert summarize([])["requests_per_second"] == 0


def test_bodies() -> None:
    config = LoadConfig(seed=7, ignore_eos=True, extra_body='{"top_k": 3, "stream_options": {"include_drafts": true}}')
    assert make_body(config, "m", "hello", 2) == {
        "model": "m",
        "prompt": "hello",
        "max_tokens": 128,
        "temperature": 0.0,
        "seed": 9,
        "ignore_eos": True,
        "top_k": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "include_drafts": True},
    }
    messages = [{"role": "user", "content": "hello"}]
    assert make_body(LoadConfig(), "m", messages, 0)["messages"] == messages
    assert make_body(LoadConfig(endpoint="chat"), "m", "hello", 0)["messages"] == messages
    assert path_of(LoadConfig(), "hello") == "/v1/completions"
    assert path_of(LoadConfig(), messages) == "/v1/chat/completions"
    with pytest.raises(InvalidArgumentError, match="use chat"):
        path_of(LoadConfig(endpoint="completions"), messages)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"request_rate": math.inf}, "request_rate"),
        ({"seconds": -1.0}, "seconds"),
        ({"num_requests": 0}, "num_requests"),
        ({"warm_up": -1}, "warm_up"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"timeout": 0.0}, "timeout"),
        ({"seed": -1}, "seed"),
        ({"concurrency": 2, "request_rate": 1.0}, "one of the two"),
        ({"extra_body": "{"}, "extra_body"),
        ({"extra_body": "[1]"}, "extra_body"),
        ({"extra_body": '{"stream": false}'}, "stream"),
        ({"extra_body": '{"stream_options": 1}'}, "stream_options"),
    ],
)
def test_a_load_that_makes_no_sense(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        LoadConfig(**options)


def test_words() -> None:
    assert parse_words("64") == (64, 64)
    assert parse_words("16-512") == (16, 512)
    for wrong in ("", "0", "9-3", "-4", "1-", "a", "1.5"):
        with pytest.raises(InvalidArgumentError, match="prompt_words"):
            parse_words(wrong)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("https://h/v1", "https://h"),
        ("http://h/api/v1/", "http://h/api"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert base_address(url) == address


@pytest.mark.parametrize("url", ["", "h:8000", "ftp://h", "http://", "http://h:x", "http://h?a=b", "http://u:p@h"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="url must be"):
        base_address(url)
