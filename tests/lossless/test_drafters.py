"""Every drafter and policy writes the tokens of autoregressive decoding, also when plans change between rounds."""

from typing import Any

import pytest
from engines import generate
from policies import Erratic

from layerskip.decoding.config import GenerationConfig
from layerskip.language_model import LanguageModel

SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
REPEATING = [3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1, 4]


def write(lm: LanguageModel, prompts: list[list[int]], policy: Any = None, **options: Any) -> list[list[int]]:
    return generate(lm.decoder, prompts, policy=policy, **options)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.2}], ids=["greedy", "coupled", "penalty"])
@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
def test_strategies(lm: LanguageModel, prompts: list[list[int]], strategy: str, options: dict[str, Any]) -> None:
    for texts in ([REPEATING], [*prompts, REPEATING]):
        expected = write(lm, texts, generation_strategy="autoregressive", max_new_tokens=40, **options)
        found = write(lm, texts, generation_strategy=strategy, max_new_tokens=40, num_speculations=5, **options)
        assert found == expected


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("seed", range(6))
def test_plans_that_change_every_round(
    lm: LanguageModel, prompts: list[list[int]], seed: int, options: dict[str, Any]
) -> None:
    texts = [*prompts, REPEATING]
    expected = write(lm, texts, generation_strategy="autoregressive", max_new_tokens=36, **options)
    policy = Erratic(seed, lm.decoder.num_layers)
    assert write(lm, texts, policy, max_new_tokens=36, **options) == expected
    assert len({(plan.source, plan.exit_layer) for plan in policy.seen}) > 3
    assert policy.prepared == len(texts)
    assert policy.rested > 0


def test_some_of_these_plans_stop_early(lm: LanguageModel, prompts: list[list[int]]) -> None:
    policies = [Erratic(seed, lm.decoder.num_layers) for seed in range(6)]
    for policy in policies:
        write(lm, prompts, policy, max_new_tokens=36)
    assert sum(policy.stopped > 0 for policy in policies) > 3


@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_short_texts(lm: LanguageModel, strategy: str, max_new_tokens: int) -> None:
    expected = write(lm, [REPEATING], generation_strategy="autoregressive", max_new_tokens=max_new_tokens)
    assert write(lm, [REPEATING], generation_strategy=strategy, max_new_tokens=max_new_tokens) == expected


@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
def test_ends_inside_drafts_and_full_caches(lm: LanguageModel, strategy: str) -> None:
    plain = write(lm, [REPEATING], generation_strategy="autoregressive", max_new_tokens=200)[0]
    assert len(plain) == lm.decoder.max_context - len(REPEATING)
    assert write(lm, [REPEATING], generation_strategy=strategy, max_new_tokens=200) == [plain]
    for stop in dict.fromkeys(plain[:30]):
        options = {"max_new_tokens": 40, "eos_token_ids": (stop,)}
        expected = write(lm, [REPEATING], generation_strategy="autoregressive", **options)
        assert write(lm, [REPEATING], generation_strategy=strategy, **options) == expected


def test_drafts_from_the_text_run_no_layers(lm: LanguageModel) -> None:
    """A round of n-gram drafts enters each layer once, however many tokens it adds."""
    config = GenerationConfig(generation_strategy="ngram", max_new_tokens=40, num_speculations=6)
    result = lm.generate([REPEATING], config)[0]
    assert result.stats.drafted > 0
    assert result.stats.layer_calls == (result.stats.rounds + 1) * lm.decoder.num_layers
