"""Drafts from texts of other requests: what is written stays what is written alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixBlocks
from layerskip.decoding.request import make_request
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "ngram", "num_speculations": 1},
    {"generation_strategy": "ngram", "num_speculations": 6},
    {"generation_strategy": "adaptive"},
    {"exit_layer": 2, "num_speculations": 3},
]
RULES: list[dict[str, Any]] = [
    {"acceptance": "coupled"},
    {"temperature": 0.8, "acceptance": "coupled"},
    {"temperature": 1.2, "top_k": 9, "acceptance": "coupled"},
    {"repetition_penalty": 1.2},
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [3, 1, 4, 1, 5, 9, 2, 7], [20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="module", params=["native", "torch", "static"])
def lm(make_lm: Callable[..., LanguageModel], request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return make_lm(kernels=request.param)


def make_engine(lm: LanguageModel, **options: Any) -> Engine:
    capacity = lm.decoder.max_context
    return Engine(lm.decoder, max_rows=4, capacity=capacity, experience=lm._experience, shares_suffixes=True, **options)


def add(engine: Engine, prompt: list[int], **options: Any) -> Row:
    config = GenerationConfig(**{"max_new_tokens": 24, "seed": 3, **options})
    return engine.add(make_request(engine.decoder, prompt, config, seed=3))


def alone(lm: LanguageModel, prompt: list[int], **options: Any) -> list[int]:
    return lm.generate([prompt], **{"max_new_tokens": 24, "seed": 3, **options})[0].token_ids


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("max_tokens", [40, 1000])
def test_the_text_is_the_same_with_and_without(
    lm: LanguageModel, way: dict[str, Any], rules: dict[str, Any], max_tokens: int
) -> None:
    """Rows join at every step, some leave early, and most prompts come again and again."""
    expected = [alone(lm, prompt, **way, **rules) for prompt in PROMPTS]
    engine, pick = make_engine(lm), random.Random(0)
    assert engine._suffixes is not None
    engine._suffixes._max_tokens = max_tokens
    rows: list[tuple[int, Row]] = []
    while len(rows) < 24 or engine.rows:
        if len(rows) < 24 and engine.free_rows:
            number = pick.randrange(len(PROMPTS))
            rows.append((number, add(engine, PROMPTS[number], **way, **rules)))
        engine.step()
        if engine.rows and pick.random() < 0.05:
            engine.finish(pick.choice(engine.rows), "interrupted")
    for number, row in rows:
        assert row.output == expected[number][: len(row.output)]
        assert row.finish_reason == "interrupted" or len(row.output) == len(expected[number])
    assert 0 < len(engine._suffixes) <= max_tokens


@pytest.mark.parametrize("blocks", [False, True])
def test_a_text_that_was_written_before_is_drafted(lm: LanguageModel, blocks: bool) -> None:
    engine = make_engine(lm, prefix_blocks=PrefixBlocks(max_bytes=10**6, block_tokens=4) if blocks else None)
    way: dict[str, Any] = {"generation_strategy": "ngram", "num_speculations": 5}
    for prompt in PROMPTS:
        rounds = []
        for _ in range(2):
            row = add(engine, prompt, **way)
            while engine.rows:
                engine.step()
            assert row.output == alone(lm, prompt, **way)
            rounds.append(row.recorder.rounds)
        assert rounds[1] <= 8  # 24 tokens, most of them six at a time
        assert rounds[1] < rounds[0] or rounds[0] <= 5


def test_texts_are_shared_where_asked_for(lm: LanguageModel) -> None:
    engine = Engine(lm.decoder, max_rows=1, capacity=lm.decoder.max_context)
    way: dict[str, Any] = {"generation_strategy": "ngram", "num_speculations": 5}
    rounds = []
    for _ in range(2):
        row = add(engine, PROMPTS[3], **way)
        while engine.rows:
            engine.step()
        rounds.append(row.recorder.rounds)
    assert rounds[0] == rounds[1] > 8
