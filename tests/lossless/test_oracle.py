"""The cached autoregressive decoder against one that reads the whole text again for each token."""

from collections.abc import Callable
from typing import Any

import pytest
from engines import generate

from layerskip.language_model import LanguageModel

SAMPLED = [
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 7},
    {"do_sample": True, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05, "top_k": 20, "top_p": 0.95},
]


@pytest.mark.parametrize("exit_layer", [None, 1, 3, 5])
def test_greedy_equals_decoding_without_a_cache(
    lm: LanguageModel, prompts: list[list[int]], slow_decode: Callable[..., list[int]], exit_layer: int | None
) -> None:
    strategy = "autoregressive" if exit_layer is None else "early_exit"
    options = {"max_new_tokens": 20, "exit_layer": exit_layer, "generation_strategy": strategy}
    for prompt in prompts:
        assert lm.generate([prompt], **options)[0].token_ids == slow_decode(lm, prompt, **options)


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_sampling_equals_decoding_without_a_cache(
    lm: LanguageModel, prompts: list[list[int]], slow_decode: Callable[..., list[int]], sampling: dict, seed: int
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "seed": seed, "generation_strategy": "autoregressive", **sampling}
    for prompt in prompts[1:]:
        assert lm.generate([prompt], **options)[0].token_ids == slow_decode(lm, prompt, **options)


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"logit_bias": {5: 8.0, 9: -100.0}},
    ],
    ids=str,
)
def test_context_processors_equal_decoding_without_a_cache(
    lm: LanguageModel, prompts: list[list[int]], slow_decode: Callable[..., list[int]], processors: dict
) -> None:
    options = {"max_new_tokens": 30, "generation_strategy": "autoregressive", **processors}
    plain = slow_decode(lm, prompts[0], max_new_tokens=30)
    processed = slow_decode(lm, prompts[0], **options)
    assert processed != plain
    assert lm.generate([prompts[0]], **options)[0].token_ids == processed


def test_early_exits_write_other_texts(lm: LanguageModel, prompts: list[list[int]]) -> None:
    texts = [
        tuple(lm.generate([prompts[1]], exit_layer=exit_layer, generation_strategy="early_exit")[0].token_ids)
        for exit_layer in (1, 2, 5)
    ]
    assert len(set(texts)) == 3


def test_prompts_read_in_chunks_give_the_same_text(lm: LanguageModel, prompts: list[list[int]]) -> None:
    whole = [result.token_ids for result in lm.generate(prompts, max_new_tokens=12)]
    assert generate(lm.decoder, prompts, max_new_tokens=12, prefill_chunk=4) == whole
    for prompt, expected in zip(prompts, whole, strict=True):
        assert generate(lm.decoder, [prompt], max_new_tokens=12, prefill_chunk=4) == [expected]
