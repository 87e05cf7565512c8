"""Rows of a ragged batch don't feel each other: each gives what it gives alone."""

from collections.abc import Callable
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import decode, make_batch
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache

MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.9},
    {"do_sample": True, "acceptance": "rejection"},
    {"do_sample": True, "acceptance": "rejection", "block_verification": False, "top_k": 10},
    {"do_sample": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"generation_strategy": "autoregressive"},
    {"generation_strategy": "autoregressive", "exit_layer": 2, "do_sample": True},
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
    batch = make_batch(lm.decoder, [[1, 2, 3]] * 4, config, eos_token_ids=(), seed=0)
    rows = list(batch.rows)
    for row in rows:
        row.seed = 100 + row.index
    for _ in decode(batch):
        pass
    for row in rows:
        assert row.output == lm.generate([[1, 2, 3]], config, seed=row.seed)[0].token_ids


def test_finished_rows_leave_the_cache(
    lm: LanguageModel, ragged: list[list[int]], layer_log: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[int] = []
    remove_row = KVCache.remove_row

    def spy(self: KVCache, row: int) -> None:
        removed.append(row)
        remove_row(self, row)

    options: dict[str, Any] = {"exit_layer": 3, "max_new_tokens": 24}
    options["eos_token_ids"] = eos_for(lm, ragged, options)
    monkeypatch.setattr(KVCache, "remove_row", spy)
    layer_log.clear()
    lm.generate(ragged, **options)
    rows = [rows for _, rows, _ in layer_log]
    assert rows[0] == 8
    assert rows == sorted(rows, reverse=True)  # batches only shrink
    assert rows[-1] < 8
    assert any(place < count - 1 for place, count in zip(removed, range(8, 0, -1), strict=False))  # some row moved
