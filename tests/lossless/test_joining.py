"""Requests that join and leave a running batch: each gets what it gets alone, whatever the others are."""

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.request import Request, make_request
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

STRATEGIES: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    {"generation_strategy": "early_exit", "exit_layer": 2},
    {"generation_strategy": "ngram", "num_speculations": 3},
    {"exit_layer": 1, "num_speculations": 2},
    {"exit_layer": 3, "num_speculations": 5},
    {"generation_strategy": "adaptive"},
]
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.4, "top_k": 7},
    {"do_sample": True, "top_p": 0.8},
    {"do_sample": True, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "temperature": 0.9},
    {"frequency_penalty": 1.1, "presence_penalty": 0.3, "temperature": 0.8},
    {"logit_bias": ((3, 4.0), (11, -2.0)), "logprobs": 1},
    {"temperature": 0.9, "acceptance": "rejection"},
    {"temperature": 1.1, "top_k": 12, "acceptance": "rejection", "block_verification": False},
]
REPEATING = [3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1, 4]


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes and goes."""

    prompt: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    step: int
    """The step before which it joins, if there is room."""
    leaves_after: int | None
    """Tokens after which it is aborted."""

    @property
    def config(self) -> GenerationConfig:
        return GenerationConfig(**dict(self.options))


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    prompt = draw(st.one_of(st.just(REPEATING), st.lists(st.integers(0, 47), min_size=1, max_size=30)))
    options = {**draw(st.sampled_from(STRATEGIES)), **draw(st.sampled_from(RULES))}
    if options.get("generation_strategy") == "adaptive":
        options["acceptance"] = "coupled"  # the plans of adaptive decoding depend on measured times
    options["seed"] = draw(st.integers(0, 5))
    options["max_new_tokens"] = draw(st.integers(1, 24))
    options["eos_token_ids"] = tuple(draw(st.lists(st.integers(0, 47), max_size=2)))
    leaves = draw(st.one_of(st.none(), st.none(), st.integers(1, 12)))
    return Arrival(tuple(prompt), tuple(options.items()), draw(st.integers(0, 12)), leaves)


def request_of(lm: LanguageModel, arrival: Arrival) -> Request:
    config = arrival.config
    return make_request(lm.decoder, arrival.prompt, config, seed=config.seed or 0)


class Alone:
    """What each request gives alone, remembered."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm, self._outputs = lm, dict[tuple[Any, ...], list[int]]()

    def __call__(self, arrival: Arrival) -> list[int]:
        key = (arrival.prompt, arrival.options)
        if key not in self._outputs:
            self._outputs[key] = self._lm.generate([list(arrival.prompt)], arrival.config)[0].token_ids
        return self._outputs[key]


def run(engine: Engine, lm: LanguageModel, schedule: list[Arrival]) -> list[tuple[Arrival, Row]]:
    """Let the requests of a schedule join and leave."""
    waiting = sorted(schedule, key=lambda arrival: arrival.step)
    rows: list[tuple[Arrival, Row]] = []
    step = 0
    while waiting or engine.rows:
        while waiting and waiting[0].step <= step and engine.free_rows:
            arrival = waiting.pop(0)
            rows.append((arrival, engine.add(request_of(lm, arrival))))
        engine.step()
        for arrival, row in rows:
            leaves = arrival.leaves_after
            if row.finish_reason is None and leaves is not None and len(row.output) >= leaves:
                engine.finish(row, "interrupted", length=leaves)
        step += 1
    return rows


@pytest.fixture(scope="module", params=["native", "torch"])
def joined(make_lm: Callable[..., LanguageModel], request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return make_lm(kernels=request.param)


@pytest.fixture(scope="module")
def alone(joined: LanguageModel) -> Alone:
    return Alone(joined)


@pytest.mark.parametrize("keeps_prefixes", [False, True])
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_rows_that_join_and_leave_get_what_they_get_alone(
    joined: LanguageModel, alone: Alone, keeps_prefixes: bool, data: st.DataObject
) -> None:
    schedule = data.draw(st.lists(arrivals(), min_size=2, max_size=9))
    max_rows, chunk = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([3, 8, 1024]))
    engine = Engine(
        joined.decoder,
        max_rows=max_rows,
        capacity=96,
        keeps_prefixes=keeps_prefixes,
        prefill_chunk=chunk,
        experience=joined._experience,
    )
    for arrival, row in run(engine, joined, schedule):
        expected = alone(arrival)
        if row.finish_reason == "interrupted":
            expected = expected[: arrival.leaves_after]
        assert row.output == expected, arrival
    assert engine.rows == []
    assert engine.free_rows == max_rows


@pytest.mark.parametrize("point", range(9))
def test_an_abort_at_any_point_changes_no_other_text(joined: LanguageModel, alone: Alone, point: int) -> None:
    """Before the first step, while prompts are read, between rounds."""
    schedule = [
        Arrival(tuple(REPEATING), (("max_new_tokens", 12), ("exit_layer", 2)), 0, None),
        Arrival((7, 8, 9) * 8, (("max_new_tokens", 12), ("temperature", 0.8), ("seed", 3)), 0, None),
        Arrival((1,), (("max_new_tokens", 12), ("generation_strategy", "ngram")), 0, None),
        Arrival((4, 4, 4), (("max_new_tokens", 12), ("exit_layer", 2)), 0, None),
    ]
    for victim in range(len(schedule)):
        engine = Engine(joined.decoder, max_rows=4, capacity=64, prefill_chunk=5, keeps_prefixes=victim % 2 == 0)
        rows = [engine.add(request_of(joined, arrival)) for arrival in schedule]
        for _ in range(point):
            engine.step()
        if rows[victim].finish_reason is None:
            engine.finish(rows[victim], "interrupted")
        while engine.rows:
            engine.step()
        for place, (arrival, row) in enumerate(zip(schedule, rows, strict=True)):
            expected = alone(arrival)
            assert row.output == (expected[: len(row.output)] if place == victim else expected)


def test_thousands_of_joins_and_leaves_keep_memory_flat(joined: LanguageModel) -> None:
    """No object of the engine stays behind: rows, batches, policies and views are as many after 2,000 as after 200."""
    engine = Engine(joined.decoder, max_rows=4, capacity=48, keeps_prefixes=True, experience=joined._experience)
    pick = random.Random(0)

    def serve(requests: int) -> int:
        left = requests
        while left or engine.rows:
            while left and engine.free_rows:
                options = {**pick.choice(STRATEGIES[:5]), **pick.choice(RULES[:6])}
                config = GenerationConfig(max_new_tokens=pick.randint(1, 4), **options)
                prompt = [pick.randrange(48) for _ in range(pick.randint(1, 12))]
                engine.add(make_request(joined.decoder, prompt, config, seed=left))
                left -= 1
            engine.step()
            for row in engine.rows:
                if pick.random() < 0.2:
                    engine.finish(row, "interrupted")
        gc.collect()
        return len(gc.get_objects())

    serve(200)
    before = serve(200)
    after = serve(1800)
    assert after - before < 200
    assert sum(type(thing) is Row for thing in gc.get_objects()) == 0
