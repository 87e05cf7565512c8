"""Requests join, every step gives tokens, rows leave: what the engine checks, and what it does for whom."""

from typing import Any

import pytest
from engines import cache_of, drain, start

from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.policy import UNLIMITED, FixedPolicy, Plan
from layerskip.decoding.request import Request, make_request
from layerskip.decoding.strategy import make_policy
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel

SPECULATIVE: dict[str, Any] = {"max_new_tokens": 30, "exit_layer": 3, "num_speculations": 3}


def request(lm: LanguageModel, prompt: list[int], *, seed: int = 0, **options: Any) -> Request:
    return make_request(lm.decoder, prompt, GenerationConfig(**options), seed=seed)


def alone(lm: LanguageModel, prompt: list[int], *, seed: int = 0, **options: Any) -> list[int]:
    return lm.generate([prompt], seed=seed, **options)[0].token_ids


def test_events_tell_what_became_of_the_drafts(text_lm: LanguageModel) -> None:
    engine = start(text_lm.decoder, [[2, 3, 4]], **SPECULATIVE)
    (row,) = engine.rows
    first, *events = drain(engine)
    assert (first.drafts, first.num_accepted, len(first.tokens)) == ((), 0, 1)  # the prompt's own token
    for event in events:
        assert event.row is row
        assert len(event.tokens) == event.num_accepted + 1
        assert event.tokens[:-1] == event.drafts[: event.num_accepted]
        assert event.num_accepted == len(event.drafts) or event.tokens[-1] != event.drafts[event.num_accepted]
    assert {event.num_accepted for event in events} >= {0, 3}
    assert [token for event in (first, *events) for token in event.tokens] == row.output
    assert (row.finish_reason, row.remaining) == ("length", 0)
    assert row.output == alone(text_lm, [2, 3, 4], **SPECULATIVE)


def test_a_step_reads_a_chunk_of_each_prompt(text_lm: LanguageModel) -> None:
    """Rows whose prompts are read start at once; the others go on reading."""
    engine = start(text_lm.decoder, [[2, 3], [4] * 9], prefill_chunk=4, **SPECULATIVE)
    short, long = engine.rows
    assert [event.row for event in engine.step()] == [short]
    assert [event.row for event in engine.step()] == [short]
    assert sorted(event.row.prompt_length for event in engine.step()) == [2, 9]
    assert len(long.output) == 1
    drain(engine)
    assert short.output == alone(text_lm, [2, 3], **SPECULATIVE)
    assert long.output == alone(text_lm, [4] * 9, **SPECULATIVE)


def test_a_caller_may_end_a_row(text_lm: LanguageModel) -> None:
    """The ended row gets no more events; the other goes on as if it were alone."""
    engine = start(text_lm.decoder, [[2, 3], [5, 6, 7]], **SPECULATIVE)
    first, second = engine.rows
    while engine.rows:
        for event in engine.step():
            assert event.row is second or first.finish_reason is None
        if first.finish_reason is None and len(first.output) >= 5:
            engine.finish(first, "stop", "enough", length=4)
            assert engine.rows == [second]
    assert (len(first.output), first.finish_reason, first.stop_reason) == (4, "stop", "enough")
    assert second.output == alone(text_lm, [5, 6, 7], **SPECULATIVE)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_row_may_end_before_its_prompt_is_read(text_lm: LanguageModel, num_steps: int) -> None:
    engine = start(text_lm.decoder, [[2] * 9, [5, 6, 7]], prefill_chunk=4, **SPECULATIVE)
    first, second = engine.rows
    for _ in range(num_steps):
        engine.step()
    engine.finish(first, "interrupted")
    assert engine.rows == [second]
    assert engine.free_rows == 1
    drain(engine)
    assert first.output == []
    assert second.output == alone(text_lm, [5, 6, 7], **SPECULATIVE)


def test_a_row_that_has_ended_may_be_cut(text_lm: LanguageModel) -> None:
    """Its text has turned out to end earlier."""
    engine = start(text_lm.decoder, [[2, 3]], **SPECULATIVE)
    (row,) = engine.rows
    drain(engine)
    full = list(row.output)
    engine.finish(row, "stop", "x", length=7)
    assert (row.output, row.finish_reason, row.stop_reason) == (full[:7], "stop", "x")


def test_ends_between_drafts_are_forgotten_in_the_cache(text_lm: LanguageModel) -> None:
    """A row that ends within its accepted drafts has no keys and values beyond its end."""
    full = alone(text_lm, [2, 3, 4], **SPECULATIVE)
    for end in dict.fromkeys(full):
        config = GenerationConfig(**SPECULATIVE, eos_token_ids=(end,))
        engine = Engine(text_lm.decoder, max_rows=1, capacity=64, keeps_prefixes=True)
        row = engine.add(make_request(text_lm.decoder, [2, 3, 4], config, seed=0))
        drain(engine)
        assert row.output == full[: full.index(end) + 1]
        assert cache_of(engine).lengths == [len(row.tokens) - 1]


def test_a_request_may_join_while_others_run(text_lm: LanguageModel) -> None:
    """By rules of its own, in a batch of its own where it needs one."""
    ways: list[dict[str, Any]] = [
        {"exit_layer": 2},
        {"temperature": 0.8, "top_k": 9},
        {"generation_strategy": "autoregressive"},
        {"repetition_penalty": 1.3},
        {"generation_strategy": "early_exit", "exit_layer": 2},
    ]
    prompts = [[2 + i, 5, 6 + i] for i in range(len(ways))]
    engine = Engine(text_lm.decoder, max_rows=len(ways), capacity=40)
    rows = []
    for i, way in enumerate(ways):
        rows.append(engine.add(request(text_lm, prompts[i], seed=i, max_new_tokens=20, **way)))
        engine.step()
        engine.step()
    drain(engine)
    for i, (row, way) in enumerate(zip(rows, ways, strict=True)):
        assert row.output == alone(text_lm, prompts[i], seed=i, max_new_tokens=20, **way), way


def test_a_full_engine_refuses(text_lm: LanguageModel) -> None:
    engine = Engine(text_lm.decoder, max_rows=2, capacity=12)
    assert (engine.free_rows, engine.capacity) == (2, 12)
    first = engine.add(request(text_lm, [2, 3], max_new_tokens=10))
    engine.add(request(text_lm, [2, 3], max_new_tokens=10))
    assert engine.free_rows == 0
    with pytest.raises(InvalidArgumentError, match="all 2 rows of the engine are in use; finish one first"):
        engine.add(request(text_lm, [2, 3], max_new_tokens=10))
    engine.finish(first, "interrupted")
    engine.add(request(text_lm, [2, 3], max_new_tokens=10))


def test_requests_longer_than_a_row_are_refused(text_lm: LanguageModel) -> None:
    engine = Engine(text_lm.decoder, max_rows=2, capacity=12)
    with pytest.raises(InvalidArgumentError, match=r"a request of 3 \+ 10 tokens doesn't fit a row of 12"):
        engine.add(request(text_lm, [2, 3, 4], max_new_tokens=10))
    assert (engine.rows, engine.free_rows) == ([], 2)
    row = engine.add(request(text_lm, [2, 3], max_new_tokens=10))
    engine.step()
    engine.reserve(1, 20)  # never fewer rows than there are
    assert (engine.free_rows, engine.capacity) == (1, 20)
    other = engine.add(request(text_lm, [2, 3, 4], max_new_tokens=17))
    drain(engine)
    assert row.output == alone(text_lm, [2, 3], max_new_tokens=10)
    assert other.output == alone(text_lm, [2, 3, 4], max_new_tokens=17)


@pytest.mark.parametrize("size", [(0, 5), (1, 0)])
def test_an_engine_needs_room(text_lm: LanguageModel, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1 row and 1 token"):
        Engine(text_lm.decoder, max_rows=size[0], capacity=size[1])


def test_prefixes_are_kept_where_asked_for(text_lm: LanguageModel) -> None:
    for keeps in (False, True):
        engine = Engine(text_lm.decoder, max_rows=1, capacity=40, keeps_prefixes=keeps)
        cached = []
        for _ in range(2):
            row = engine.add(request(text_lm, [2, 3, 4, 5], max_new_tokens=8))
            drain(engine)
            cached.append(row.recorder.cached_tokens)
            assert row.output == alone(text_lm, [2, 3, 4, 5], max_new_tokens=8)
        assert cached == [0, 3 if keeps else 0]


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"generation_strategy": "autoregressive"}, None),
        ({"generation_strategy": "early_exit", "exit_layer": 2}, None),
        ({"exit_layer": 3}, Plan(source="layers", exit_layer=3, num_speculations=4, lease=UNLIMITED)),
        ({"num_speculations": 2}, Plan(source="layers", exit_layer=1, num_speculations=2, lease=UNLIMITED)),
        ({"generation_strategy": "ngram", "num_speculations": 7}, Plan(source="text", num_speculations=7)),
    ],
)
def test_strategies_are_policies(text_lm: LanguageModel, options: dict[str, Any], plan: Plan | None) -> None:
    policy = make_policy(GenerationConfig(**options), text_lm.decoder, Experience(text_lm.decoder))
    assert policy == (None if plan is None else FixedPolicy(fixed=plan))


def test_a_policy_is_asked_for_the_rows_that_run(text_lm: LanguageModel) -> None:
    """At every round, and prepared once, before the rows' time begins."""
    seen: list[int] = []
    prepared: list[int] = []

    class Watching(FixedPolicy):
        def prepare(self, view: Any) -> None:
            prepared.append(view.num_rows)

        def plan(self, view: Any) -> Plan:
            seen.append(view.num_rows)
            return self.fixed

    policy = Watching(fixed=Plan(source="layers", exit_layer=3, num_speculations=1))
    engine = Engine(text_lm.decoder, max_rows=3, capacity=40, policy=policy)
    for length in (4, 8, 12):
        engine.add(request(text_lm, [2, 3], max_new_tokens=length))
    row = engine.rows[0]
    assert engine.policy_of(row) is policy
    drain(engine)
    assert prepared == [3]
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {1, 2, 3}


def test_steps_that_the_rows_end_in_are_told_to_the_policy(text_lm: LanguageModel) -> None:
    told: list[int] = []

    class Resting(FixedPolicy):
        def observe(self, plan: Plan, result: Any) -> None:
            told.append(len(result.step_seconds))

    engine = start(text_lm.decoder, [[2, 3]], max_new_tokens=8, policy=Resting(fixed=Plan(source="none", steps=5)))
    drain(engine)
    assert told == [5, 2]


def test_rows_without_drafts_have_no_policy(text_lm: LanguageModel) -> None:
    engine = start(text_lm.decoder, [[2, 3]], generation_strategy="autoregressive", max_new_tokens=3)
    assert engine.policy_of(engine.rows[0]) is None


def test_the_cache_is_as_large_as_needed(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    new_cache = text_lm.decoder.new_cache
    monkeypatch.setattr(text_lm.decoder, "new_cache", lambda *size: made.append(size) or new_cache(*size))
    text_lm.generate([[2] * 5, [2] * 20], max_new_tokens=10, exit_layer=3)
    assert made == [(2, 30)]
