"""Whole rounds as CUDA graphs hold them, run on a CPU: the texts are those of plain decoding, in every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.graphs.static import LEAST_SLOTS

PROMPTS = [[5, 9, 11, 40], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "smollm3": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], load_static: Callable[[Path], LanguageModel]
) -> tuple[LanguageModel, LanguageModel]:
    """One checkpoint in whole rounds and operator by operator."""
    folder = tiny_checkpoint(request.param, **FAMILIES[request.param])
    return load_static(folder), layerskip.load(str(folder), kernels="torch", device="cpu")


def texts(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [result.token_ids for result in lm.generate(prompts, **options)]


def test_every_exit_and_length(pair: tuple[LanguageModel, LanguageModel]) -> None:
    static, plain = pair
    expected = texts(plain, PROMPTS, generation_strategy="autoregressive", max_new_tokens=20)
    assert texts(static, PROMPTS, generation_strategy="autoregressive", max_new_tokens=20) == expected
    for exit_layer in range(1, 5):
        for num_speculations in range(1, 7):
            options = {"exit_layer": exit_layer, "num_speculations": num_speculations, "max_new_tokens": 20}
            assert texts(static, PROMPTS, **options) == expected, options
    used = {(round_.shape.exit_layer, round_.shape.num_drafts) for round_ in static.decoder.compiled}
    assert used >= {(0, 0), *((e, k) for e in range(1, 5) for k in range(1, 7))}


def test_texts_that_outgrow_their_slots_and_fill_the_context(pair: tuple[LanguageModel, LanguageModel]) -> None:
    static, plain = pair
    context = static.decoder.max_context
    prompts = [[(5 * i) % 96 for i in range(context - room)] for room in (1, 4, 70)]
    expected = texts(plain, prompts, generation_strategy="autoregressive", max_new_tokens=500)
    assert [len(text) for text in expected] == [1, 4, 70]
    assert texts(static, prompts, max_new_tokens=500, exit_layer=2, num_speculations=5) == expected
    alone = texts(static, prompts[2:], max_new_tokens=500, exit_layer=2, num_speculations=5)
    assert alone == expected[2:]
    sizes = {round_.shape.num_slots for round_ in static.decoder.compiled}
    assert sizes >= {LEAST_SLOTS, 2 * LEAST_SLOTS, context + 1}


def test_the_statistics_are_those_of_separate_calls(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """As long as no row is near its end."""
    options = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": 41, "ignore_eos": True}
    ours, theirs = (lm.generate(PROMPTS[:1], **options)[0] for lm in pair)
    assert ours.token_ids == theirs.token_ids
    for name in ("rounds", "drafted", "accepted", "drafted_by_position", "accepted_by_position"):
        assert getattr(ours.stats, name) == getattr(theirs.stats, name), name
    assert 0 <= ours.stats.layer_calls - theirs.stats.layer_calls <= 2 * 3
    assert ours.stats.seconds_drafting > 0
    assert ours.stats.seconds_verifying > 0


def test_early_exit_without_drafts(pair: tuple[LanguageModel, LanguageModel]) -> None:
    options = {"generation_strategy": "early_exit", "exit_layer": 3, "max_new_tokens": 12}
    assert texts(pair[0], PROMPTS, **options) == texts(pair[1], PROMPTS, **options)


def test_drafts_that_are_shown_are_those_of_separate_calls(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """Also near the end, where a whole round drafts more than the row can use."""
    options = {"exit_layer": 2, "num_speculations": 9, "max_new_tokens": 21, "ignore_eos": True}
    ours, theirs = (list(lm.stream(PROMPTS[:1], show_drafts=True, **options)) for lm in pair)
    drafts = [event.token_ids for event in ours if isinstance(event, layerskip.DraftEvent)]
    assert drafts == [event.token_ids for event in theirs if isinstance(event, layerskip.DraftEvent)]
    assert drafts
    (found,), (expected,) = ([e.result for e in es if isinstance(e, layerskip.FinishEvent)] for es in (ours, theirs))
    assert found.token_ids == expected.token_ids
    assert 9 in {round_.shape.num_drafts for round_ in pair[0].decoder.compiled}
