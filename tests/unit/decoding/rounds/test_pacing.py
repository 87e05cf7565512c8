"""How much of the prompts is read at a time, by seconds that are told."""

import random
from itertools import pairwise
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.event import Event
from layerskip.decoding.request import Request, make_request
from layerskip.decoding.rounds.pacing import (
    LEAST_TOKENS,
    READING_ROUNDS,
    USUAL_ROUNDS,
    ReadingPace,
    choose_prompts,
)
from layerskip.language_model import LanguageModel


def read_all(pace: ReadingPace, num_tokens: int, fixed: float, each: float) -> list[int]:
    """Read a prompt, where n tokens take `fixed` + n x `each` seconds."""
    chunks = []
    while num_tokens:
        chunks.append(min(num_tokens, pace.tokens()))
        num_tokens -= chunks[-1]
        pace.observe_reading(chunks[-1], fixed + each * chunks[-1])
    return chunks


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.001), (0.01, 0.0002), (0.015, 0.00002), (0.0, 0.00001)])
def test_reading_takes_about_two_rounds(fixed: float, each: float) -> None:
    pace = ReadingPace(1024)
    for seconds in (0.01, 0.01, 5.0, 0.01, 0.01):  # one round measures something
        pace.observe_round(seconds)
    chunks = read_all(pace, 8000, fixed, each)
    assert chunks[0] == LEAST_TOKENS
    assert all(after <= max(LEAST_TOKENS, 2 * before) for before, after in pairwise(chunks))
    assert all(fixed + each * chunk <= READING_ROUNDS * 0.01 * 1.1 for chunk in chunks)
    best = min(1024, (READING_ROUNDS * 0.01 - fixed) / each)
    assert max(chunks) >= best / 2


def test_rounds_that_have_become_long_do_not_lengthen_reading_without_bound() -> None:
    pace = ReadingPace(1024)
    for seconds in (*[0.01] * 200, *[0.2] * 40):  # as when rows begin to draft long repetitions
        pace.observe_round(seconds)
    chunks = read_all(pace, 8000, 0.0, 0.001)
    assert USUAL_ROUNDS * 10 / 2 <= max(chunks) <= USUAL_ROUNDS * 10


def test_the_least_is_read_however_long_it_takes() -> None:
    pace = ReadingPace(1024)
    assert pace.tokens() == LEAST_TOKENS
    pace.observe_round(0.001)
    assert set(read_all(pace, 300, 1.0, 1.0)[:-1]) == {LEAST_TOKENS}


def test_a_wrong_time_is_forgotten() -> None:
    """A processor that was busy with something else for a moment slows reading down for some steps only."""
    pace = ReadingPace(1024)
    pace.observe_round(0.01)
    usual = read_all(pace, 4000, 0.001, 0.0001)[-2]
    pace.observe_reading(usual, 1.0)
    assert pace.tokens() < usual
    assert read_all(pace, 4000, 0.001, 0.0001)[-2] >= usual / 2


def test_long_rounds_allow_whole_chunks() -> None:
    pace = ReadingPace(100)
    pace.observe_round(10.0)
    pace.observe_reading(64, 0.1)
    assert pace.tokens() == 100


@pytest.mark.parametrize(
    ("unread", "places", "budget", "chosen"),
    [
        ([50], [0], 16, {0: 16}),
        ([50], [3], 100, {3: 50}),
        ([50, 5], [0, 1], 99, {0: 50}),  # beside it, the short one would take 50 as well
        ([50, 5], [0, 1], 100, {0: 50, 1: 5}),
        ([5, 6, 4, 3], [1, 2, 0, 3], 20, {0: 4, 1: 5, 2: 6}),
        ([5, 6, 4, 3], [1, 2, 0, 3], 24, {0: 4, 1: 5, 2: 6, 3: 3}),
        ([5, 6, 4], [0, 2, 1], 100, {0: 5}),  # not next to each other: the second one comes in the next step
        ([5, 50, 4], [0, 1, 2], 20, {0: 5}),  # nor does anyone overtake
        ([1], [0], 0, {0: 1}),
    ],
)
def test_which_prompts_are_read_in_a_rectangle(
    unread: list[int], places: list[int], budget: int, chosen: dict[int, int]
) -> None:
    assert choose_prompts(unread, places, budget, ragged=False) == chosen


@pytest.mark.parametrize(
    ("unread", "places", "budget", "chosen"),
    [
        ([50], [0], 16, {0: 16}),
        ([50, 5], [0, 1], 99, {0: 50, 1: 5}),
        ([50, 5], [0, 1], 53, {0: 50, 1: 3}),
        ([50, 5], [0, 1], 50, {0: 50}),
        ([5, 6, 4], [0, 4, 1], 100, {0: 5, 4: 6, 1: 4}),
        ([1], [0], 0, {0: 1}),
    ],
)
def test_which_prompts_are_read_without_padding(
    unread: list[int], places: list[int], budget: int, chosen: dict[int, int]
) -> None:
    assert choose_prompts(unread, places, budget, ragged=True) == chosen


@pytest.mark.parametrize("ragged", [False, True])
def test_a_budget_holds_whatever_waits(ragged: bool) -> None:
    pick = random.Random(0)
    for _ in range(300):
        number, budget = pick.randrange(1, 7), pick.randrange(1, 60)
        places = pick.sample(range(number), number)
        unread = [pick.randrange(1, 40) for _ in range(number)]
        counts = choose_prompts(unread, places, budget, ragged=ragged)
        assert places[0] in counts
        left = dict(zip(places, unread, strict=True))
        assert all(0 < counts[place] <= left[place] for place in counts)
        if ragged:
            assert sum(counts.values()) == min(budget, sum(unread))
        else:
            size = max(counts.values())
            assert len(counts) * size <= budget
            assert size == min(budget, unread[0]) or all(counts[place] == left[place] for place in counts)


class Clock:
    """Seconds by work: a microsecond for each layer and token of a block, and 50 for each call of a layer."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.blocks = 0.0, list[tuple[int, int]]()
        monkeypatch.setattr("layerskip.decoding.engine.time.perf_counter", lambda: self.seconds)
        monkeypatch.setattr(lm.decoder.stopwatch, "since", lambda started: self.seconds - started)
        monkeypatch.setattr(lm.decoder.calls, "observer", self.run)

    def run(self, start: int, stop: int, num_rows: int, num_queries: int) -> None:
        self.seconds += (stop - start) * (50 + num_rows * num_queries) * 1e-6
        if start == 0 and num_queries > 1:
            self.blocks.append((num_rows, num_queries))


def request(lm: LanguageModel, prompt: list[int], **options: Any) -> Request:
    config = GenerationConfig(generation_strategy="autoregressive", **options)
    return make_request(lm.decoder, prompt, config, seed=0)


def test_streams_go_on_while_a_long_prompt_is_read(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(text_lm, monkeypatch)
    context = text_lm.decoder.max_context
    engine = Engine(text_lm.decoder, max_rows=4, capacity=context, paces_reading=True, lease_seconds=0.0)
    streams = [engine.add(request(text_lm, [2 + i, 3, 4], max_new_tokens=context - 3)) for i in range(2)]
    for _ in range(8):
        engine.step()
    alone = clock.seconds
    engine.step()
    gap, clock.blocks = clock.seconds - alone, []
    long = engine.add(request(text_lm, [5] * (context - 1), max_new_tokens=1))
    while not long.output:
        before = clock.seconds
        events = engine.step()
        assert {event.row for event in events} >= set(streams)
        assert clock.seconds - before <= 4 * gap
    assert sum(tokens for _, tokens in clock.blocks) == context - 1
    assert all(rows == 1 for rows, _ in clock.blocks)


def test_prompts_are_read_in_whole_chunks_where_nobody_waits(
    text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(text_lm, monkeypatch)
    engine = Engine(text_lm.decoder, max_rows=3, capacity=100, paces_reading=True, prefill_chunk=40)
    engine.add(request(text_lm, [5] * 70, max_new_tokens=1))
    engine.add(request(text_lm, [6] * 10, max_new_tokens=1))
    engine.add(request(text_lm, [7] * 12, max_new_tokens=1))
    while engine.rows:
        engine.step()
    # The first first. Without padding, the next one fits beside its rest; in a rectangle, the others come together.
    ragged = [(1, 40), (2, 30), (1, 12)]
    assert clock.blocks == (ragged if text_lm.decoder.ragged else [(1, 40), (1, 30), (2, 12)])


def test_first_tokens_come_in_the_order_of_arrival(text_lm: LanguageModel) -> None:
    engine = Engine(text_lm.decoder, max_rows=5, capacity=100, paces_reading=True, prefill_chunk=16)
    rows = [engine.add(request(text_lm, [2 + i] * length, max_new_tokens=6)) for i, length in enumerate((60, 9, 30))]
    order: list[Event] = []
    for step in range(100):
        order += [event for event in engine.step() if len(event.row.output) == 1]
        if step in (2, 4):
            rows.append(engine.add(request(text_lm, [9] * 20, max_new_tokens=6)))
        if not engine.rows:
            break
    assert [event.row for event in order] == rows
