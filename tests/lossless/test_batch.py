"""Rows of a ragged batch don't feel each other: each gives what it gives alone."""

from collections.abc import Callable
from typing import Any

import pytest
from engines import generate
from layers import Entry

from layerskip.decoding.config import GenerationConfig
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache

MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.9},
    {"do_sample": True, "acceptance": "rejection"},
    {"do_sample": True, "acceptance": "rejection", "block_verification": False, "top_k": 10},
    {"do_sample": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"generation_strategy": "autoregressive", "exit_layer": None},
    {"generation_strategy": "early_exit", "exit_layer": 2, "do_sample": True},
]


@pytest.fixture(scope="module")
def ragged() -> list[list[int]]:
    return [
        [(5 * i + 11 * j + i * i * j) % 48 for j in range(length)]
        for i, length in enumerate((9, 1, 30, 4, 4, 17, 2, 12))
    ]


def eos_for(lm: LanguageModel, ragged: list[list[int]], options: dict[str, Any]) -> tuple[int, ...]:
    """Two ids that end some rows early, at different steps."""
    results = lm.generate(ragged, **{**options, "eos_token_ids": ()})
    return (results[2].token_ids[4], results[5].token_ids[11])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_rows_equal_each_prompt_alone(lm: LanguageModel, ragged: list[list[int]], mode: dict[str, Any]) -> None:
    options = {"exit_layer": 3, "max_new_tokens": 24, "seed": 4, **mode}
    options["eos_token_ids"] = eos_for(lm, ragged, options)
    alone = [lm.generate([prompt], **options)[0] for prompt in ragged]
    together = lm.generate(ragged, **options)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [(r.finish_reason, r.stop_reason) for r in together] == [(r.finish_reason, r.stop_reason) for r in alone]
    assert len({len(r.token_ids) for r in alone}) >= 3  # rows did end at different steps
    assert "stop" in {r.finish_reason for r in alone}
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.stats.rounds == theirs.stats.rounds
        assert ours.stats.drafted_by_position == theirs.stats.drafted_by_position
        assert ours.stats.accepted_by_position == theirs.stats.accepted_by_position


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_rows_with_different_room(make_lm: Callable[..., LanguageModel], mode: dict[str, Any]) -> None:
    """In a short context, long prompts run out of room while others go on: drafts are ragged, some rows have none."""
    lm = make_lm(context=32)
    prompts = [[(3 * i + 7 * j) % 48 for j in range(length)] for i, length in enumerate((31, 2, 29, 30, 20, 25))]
    options = {"exit_layer": 3, "max_new_tokens": 20, "num_speculations": 4, "seed": 2, **mode}
    alone = [lm.generate([prompt], **options)[0].token_ids for prompt in prompts]
    assert [len(tokens) for tokens in alone] == [1, 20, 3, 2, 12, 7]
    assert [r.token_ids for r in lm.generate(prompts, **options)] == alone


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_identical_prompts_give_identical_texts(lm: LanguageModel, acceptance: str) -> None:
    results = lm.generate([[1, 2, 3]] * 4, do_sample=True, seed=8, acceptance=acceptance, max_new_tokens=12)
    assert len({tuple(result.token_ids) for result in results}) == 1


def test_rows_may_have_seeds_of_their_own(lm: LanguageModel) -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=12, exit_layer=3)
    seeds = range(100, 104)
    together = generate(lm.decoder, [[1, 2, 3]] * 4, config, seeds=seeds)
    assert together == [lm.generate([[1, 2, 3]], config, seed=seed)[0].token_ids for seed in seeds]
    assert len({tuple(tokens) for tokens in together}) > 1


def test_finished_rows_leave_the_batch(
    lm: LanguageModel, ragged: list[list[int]], layer_log: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, int]] = []
    copy_row = KVCache.copy_row

    def spy(self: KVCache, source: int, to: int, length: int) -> None:
        moved.append((source, to))
        copy_row(self, source, to, length)

    options: dict[str, Any] = {"exit_layer": 3, "max_new_tokens": 24}
    options["eos_token_ids"] = eos_for(lm, ragged, options)
    monkeypatch.setattr(KVCache, "copy_row", spy)
    layer_log.clear()
    lm.generate(ragged, **options)
    rows = [rows for _, rows, _ in layer_log]
    assert rows[0] == 8
    assert rows == sorted(rows, reverse=True)  # nothing joins
    assert rows[-1] < 8
    assert moved
    assert all(source > to for source, to in moved)  # into the place of one that has ended
