"""What a request asks for, and what is refused before it runs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.request import (
    Request,
    check_exit_layer,
    choose_exit_layer,
    default_exit_layer,
    depth_of,
    make_request,
)
from layerskip.errors import InvalidArgumentError, PromptError, PromptTooLongError
from layerskip.language_model import LanguageModel
from layerskip.model.decoder import Decoder


def request(lm: LanguageModel, tokens: Any, *, index: int = 0, ends: tuple[int, ...] = (), **options: Any) -> Request:
    return make_request(lm.decoder, tokens, GenerationConfig(**options), seed=4, eos_token_ids=ends, index=index)


def test_the_exit_is_a_quarter_of_the_layers_if_not_given(text_lm: LanguageModel) -> None:
    depths = [SimpleNamespace(num_layers=n, adapted_exits=()) for n in (1, 3, 4, 7, 8, 32)]
    assert [default_exit_layer(cast(Decoder, decoder)) for decoder in depths] == [1, 1, 1, 1, 2, 8]
    decoder = text_lm.decoder
    assert choose_exit_layer(GenerationConfig(), decoder) == 1
    assert choose_exit_layer(GenerationConfig(generation_strategy="autoregressive"), decoder) == 5
    assert choose_exit_layer(GenerationConfig(generation_strategy="early_exit"), decoder) == 1
    assert choose_exit_layer(GenerationConfig(exit_layer=5), decoder) == 5


def test_only_an_early_exit_runs_fewer_layers(text_lm: LanguageModel) -> None:
    decoder = text_lm.decoder
    assert depth_of(GenerationConfig(generation_strategy="early_exit", exit_layer=2), decoder) == 2
    for options in ({}, {"generation_strategy": "autoregressive"}, {"exit_layer": 2}):
        assert depth_of(GenerationConfig(**options), decoder) == 5


@pytest.mark.parametrize("strategy", ["early_exit", "self_speculative", "adaptive", None])
def test_an_exit_beyond_the_network_is_refused(text_lm: LanguageModel, strategy: Any) -> None:
    config = GenerationConfig(exit_layer=6, generation_strategy=strategy)
    for call in (
        lambda: check_exit_layer(config, text_lm.decoder),
        lambda: make_request(text_lm.decoder, [2], config, seed=0),
        lambda: text_lm.generate([[2]], config),
    ):
        with pytest.raises(InvalidArgumentError, match=r"exit_layer 6 is outside 1\.\.5"):
            call()


def test_biases_of_tokens_that_there_are_not_are_refused(text_lm: LanguageModel) -> None:
    most = text_lm.config.vocab_size - 1
    assert request(text_lm, [2], logit_bias={most: 1.0}).config.logit_bias == ((most, 1.0),)
    with pytest.raises(InvalidArgumentError, match=f"token {most + 1}, and the vocabulary has the ids 0 to {most}"):
        request(text_lm, [2], logit_bias={3: 1.0, most + 1: 1.0})


@pytest.mark.parametrize("number", [-1, 21, True, 1.5, "1"])
def test_log_probabilities_of_prompts_are_checked(text_lm: LanguageModel, number: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_logprobs must be"):
        make_request(text_lm.decoder, [2], GenerationConfig(), seed=0, prompt_logprobs=number)


def test_prompts_are_checked(text_lm: LanguageModel) -> None:
    vocab, context = text_lm.config.vocab_size, text_lm.decoder.max_context
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        request(text_lm, [], index=1)
    for bad in (vocab, -1, True, 2.0):
        with pytest.raises(PromptError, match=rf"prompt 0 has token id {bad!r}; allowed .* 0\.\.{vocab - 1}"):
            request(text_lm, [2, bad])
    with pytest.raises(PromptTooLongError, match=f"prompt 0 has {context} tokens, and the context of {context}"):
        request(text_lm, [2] * context)


def test_no_more_tokens_than_the_context_holds(text_lm: LanguageModel) -> None:
    context = text_lm.decoder.max_context
    assert request(text_lm, [2] * (context - 1), max_new_tokens=3).max_new_tokens == 1
    assert request(text_lm, [2] * 5, max_new_tokens=3).max_new_tokens == 3
    assert request(text_lm, [2] * 5, max_new_tokens=10**6).max_new_tokens == context - 5


def test_tokens_that_end_it(text_lm: LanguageModel) -> None:
    """Those of the config, if it names any; otherwise the given ones; none if they are to be ignored."""
    assert request(text_lm, [2], ends=(3, 4)).eos_token_ids == {3, 4}
    assert request(text_lm, [2], ends=(3, 4), eos_token_ids=(5,)).eos_token_ids == {5}
    assert request(text_lm, [2], ends=(3, 4), eos_token_ids=()).eos_token_ids == set()
    assert request(text_lm, [2], ends=(3, 4), ignore_eos=True).eos_token_ids == set()


def test_a_request_keeps_its_own_copy_of_the_prompt(text_lm: LanguageModel) -> None:
    prompt = [2, 3]
    made = request(text_lm, prompt)
    prompt.append(4)
    assert (made.tokens, made.seed) == ((2, 3), 4)
