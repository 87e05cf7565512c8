"""Rows that share rounds: who may, and what is put together from them."""

from typing import Any

import pytest
from engines import start

from layerskip.decoding.batch import Batch, batch_key, needs_of
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.policy import FixedPolicy, Plan, RoundResult
from layerskip.language_model import LanguageModel
from layerskip.model.decoder import Decoder


@pytest.fixture
def batch(text_lm: LanguageModel) -> Batch:
    """Four rows whose prompts have been read, as if each had gained one token."""
    prompts = [[10 + i] * (i + 1) for i in range(4)]
    engine = start(text_lm.decoder, prompts, seeds=[9, 8, 7, 6], max_new_tokens=4, no_repeat_ngram_size=2)
    engine.step()
    (batch,) = engine._running
    for place, row in enumerate(batch.rows):
        row.tokens[-1] = 20 + place
    return batch


def test_contexts_grow_by_drafts(batch: Batch) -> None:
    assert batch.contexts() == [[row.tokens] for row in batch.rows]
    contexts = batch.contexts([[7, 8]] * 4)
    assert contexts is not None
    assert contexts[1] == [[11, 11, 21], [11, 11, 21, 7], [11, 11, 21, 7, 8]]


def test_what_rows_bring_along(batch: Batch) -> None:
    assert batch.num_rows == 4
    assert batch.last_tokens == [20, 21, 22, 23]
    assert batch.pending().tolist() == [[20], [21], [22], [23]]
    assert batch.seeds == [9, 8, 7, 6]
    assert batch.samples == [False] * 4
    assert batch.remaining == 3
    assert batch.context == 2 + 3 + 4 + 5
    assert batch.histories == [(0.0, 0.0)] * 4
    for lengths, found in (((9,) * 4, [2, 2, 2, 2]), ((0, 1, 2, 3), [0, 1, 2, 2])):
        assert batch.draft_lengths(Plan(source="layers", num_speculations=9, lengths=lengths)) == found
    assert batch.draft_lengths(Plan(source="layers", num_speculations=1)) == [1, 1, 1, 1]
    assert batch.cache.lengths == [1, 2, 3, 4]


def test_a_new_set_of_rows_is_put_together_anew(batch: Batch) -> None:
    sampler, seeds, cache = batch.sampler, batch.seeds, batch.cache
    batch.place(cache)
    assert batch.sampler is sampler  # nothing has changed
    assert batch.seeds is seeds
    batch.rows.pop(1)
    batch.place(cache.view(0, 3))
    assert batch.seeds == [9, 7, 6]
    assert batch.sampler is not sampler
    assert batch.cache.num_rows == 3


def test_a_sampler_of_some_rows(batch: Batch) -> None:
    assert batch.sampler_of([0, 1, 2, 3]) is batch.sampler
    assert batch.sampler_of([1, 3]).seeds == (8, 6)


def test_steps_under_way_are_told_when_rows_change(batch: Batch) -> None:
    """A policy must not take the seconds of other rows for those of the rows that it planned for."""
    seen: list[tuple[int, list[float]]] = []

    class Noting(FixedPolicy):
        def observe(self, plan: Plan, result: RoundResult) -> None:
            seen.append((plan.steps, list(result.step_seconds)))

    batch.policy = Noting(fixed=Plan(source="none"))
    batch.resting, batch.num_steps, batch.step_seconds = Plan(source="none", steps=8), 2, [0.5, 0.25]
    batch.first_step = RoundResult(drafts=[()] * 4, num_accepted=[0] * 4, tokens=[1, 2, 3, 4])
    batch.place(batch.cache)
    assert seen == []
    batch.rows.pop()
    batch.place(batch.cache.view(0, 3))
    assert seen == [(8, [0.5, 0.25])]
    assert (batch.resting, batch.num_steps, batch.step_seconds) == (None, 0, [])


REJECTION: dict[str, Any] = {"do_sample": True, "acceptance": "rejection"}


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, "tokens"),
        ({"do_sample": True, "top_k": 4}, "tokens"),
        ({"repetition_penalty": 1.1}, "contexts"),
        ({"no_repeat_ngram_size": 3}, "contexts"),
        ({"frequency_penalty": 0.1}, "contexts"),
        ({"presence_penalty": -0.1}, "contexts"),
        ({"logit_bias": {1: 1.0}}, "contexts"),
        ({"logprobs": 0}, "contexts"),
        (REJECTION, "distributions"),
        ({**REJECTION, "block_verification": False}, "distributions one by one"),
        ({**REJECTION, "repetition_penalty": 1.1}, "distributions"),
        ({**REJECTION, "generation_strategy": "autoregressive"}, "tokens"),  # nothing is drafted
        ({"acceptance": "rejection"}, "tokens"),  # nothing is drawn
    ],
)
def test_what_rows_need(options: dict[str, Any], needs: str) -> None:
    assert needs_of(GenerationConfig(**options)) == needs
    constrained = "contexts" if needs == "tokens" else needs  # a mask goes over logits
    assert needs_of(GenerationConfig(**options), constrained=True) == constrained


@pytest.fixture
def decoder(text_lm: LanguageModel) -> Decoder:
    return text_lm.decoder


PLAIN: dict[str, Any] = {"generation_strategy": "autoregressive"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"temperature": 0.7, "top_k": 9, "max_new_tokens": 3, "stop": "x", "seed": 4, "eos_token_ids": 7}),
        ({"exit_layer": 1}, {"num_speculations": 4}),  # the defaults
        ({"exit_layer": 2}, {"exit_layer": 2, "do_sample": True, "min_p": 0.2}),
        (PLAIN, {**PLAIN, "temperature": 0.4}),
        (PLAIN, {"generation_strategy": "early_exit", "exit_layer": 5}),  # all of five layers
        ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}),
        (REJECTION, {**REJECTION, "top_p": 0.5}),
        ({"logprobs": 3}, {"logit_bias": {1: 1.0}, "frequency_penalty": 1.0}),
    ],
)
def test_rows_that_share_rounds(decoder: Decoder, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert batch_key(GenerationConfig(**one), decoder) == batch_key(GenerationConfig(**other), decoder)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, PLAIN),
        ({}, {"generation_strategy": "ngram"}),
        ({}, {"repetition_penalty": 1.2}),
        ({"exit_layer": 1}, {"exit_layer": 2}),
        ({"exit_layer": 1}, {"exit_layer": 1, "num_speculations": 3}),
        ({"generation_strategy": "ngram"}, {"generation_strategy": "ngram", "num_speculations": 3}),
        ({"generation_strategy": "adaptive", "exit_layer": 2}, {}),
        (PLAIN, {"generation_strategy": "early_exit", "exit_layer": 2}),
        (REJECTION, {"do_sample": True}),
        (REJECTION, {**REJECTION, "block_verification": False}),
    ],
)
def test_rows_that_do_not(decoder: Decoder, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert batch_key(GenerationConfig(**one), decoder) != batch_key(GenerationConfig(**other), decoder)
