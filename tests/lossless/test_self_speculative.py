"""Self-speculative decoding writes the very tokens of autoregressive decoding."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

from layerskip.decoding.event import Event
from layerskip.language_model import LanguageModel
from layerskip.model.decoder import Decoder
from layerskip.model.torch.linear import WIDE

EXITS = [1, 2, 3, 4, 5]
SAMPLED = [
    {"temperature": 0.7},
    {"do_sample": True},
    {"temperature": 1.4, "top_k": 5},
    {"do_sample": True, "top_p": 0.7},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"do_sample": True, "repetition_penalty": 1.3},
    {"do_sample": True, "no_repeat_ngram_size": 2},
    {"do_sample": True, "frequency_penalty": 0.7, "presence_penalty": -0.5},
    {"temperature": 0.8, "logit_bias": {2: 2.5, 7: -4.0}, "logprobs": 2},
]
PROCESSORS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"frequency_penalty": 1.2, "presence_penalty": 0.6},
    {"logit_bias": {3: 3.0}},
    {"logprobs": 0},
]


def generate(lm: LanguageModel, prompt: list[int], **options: Any) -> list[int]:
    return lm.generate([prompt], **options)[0].token_ids


def autoregressive(lm: LanguageModel, prompt: list[int], **options: Any) -> list[int]:
    return generate(lm, prompt, **options, generation_strategy="autoregressive")


def test_rounds_are_accepted_wholly_partly_and_not_at_all(
    lm: LanguageModel, prompts: list[list[int]], rounds_of: Callable[..., list[Event]]
) -> None:
    """Without all three kinds of rounds, equality below would prove little."""
    for options in ({}, {"do_sample": True, "seed": 1}):
        for exit_layer in (2, 3, 4):
            rounds = [
                event
                for prompt in prompts
                for event in rounds_of(
                    lm, prompt, max_new_tokens=60, exit_layer=exit_layer, num_speculations=3, **options
                )
            ]
            accepted = {event.num_accepted for event in rounds if len(event.drafts) == 3}
            assert accepted == {0, 1, 2, 3}


@pytest.mark.parametrize("exit_layer", EXITS)
def test_greedy(lm: LanguageModel, prompts: list[list[int]], exit_layer: int) -> None:
    for prompt in prompts:
        expected = autoregressive(lm, prompt, max_new_tokens=24)
        for num_speculations in (1, 2, 3, 4, 8):
            options = {"exit_layer": exit_layer, "num_speculations": num_speculations}
            assert generate(lm, prompt, max_new_tokens=24, **options) == expected, options


@pytest.mark.parametrize("sampling", SAMPLED, ids=str)
def test_coupled_sampling(lm: LanguageModel, prompts: list[list[int]], sampling: dict) -> None:
    texts = set()
    for seed in (0, 2**63 - 1):
        options = {"max_new_tokens": 20, "seed": seed, **sampling}
        expected = autoregressive(lm, prompts[1], **options)
        texts.add(tuple(expected))
        for exit_layer, num_speculations in [(1, 1), (2, 4), (3, 2), (4, 8), (5, 3)]:
            settings = {"exit_layer": exit_layer, "num_speculations": num_speculations}
            assert generate(lm, prompts[1], **options, **settings) == expected
    assert len(texts) == 2  # another seed, another text


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 3}], ids=["greedy", "coupled"])
def test_weights_that_are_not_packed(make_lm: Callable[..., LanguageModel], prompts: list, options: dict) -> None:
    """Wide ones, whose products of one row and of several are computed by different kernels."""
    lm = make_lm(width=WIDE, layers=4)
    expected = autoregressive(lm, prompts[1], max_new_tokens=32, **options)
    accepted = 0
    for exit_layer, num_speculations in [(1, 2), (2, 4), (3, 8), (4, 1)]:
        settings = {"exit_layer": exit_layer, "num_speculations": num_speculations}
        (result,) = lm.generate([prompts[1]], max_new_tokens=32, **options, **settings)
        assert result.token_ids == expected, settings
        accepted += result.stats.accepted
    assert accepted > 10


@pytest.mark.parametrize("processors", PROCESSORS, ids=str)
@pytest.mark.parametrize("exit_layer", [1, 3, 5])
def test_greedy_with_context_processors(
    lm: LanguageModel, prompts: list[list[int]], processors: dict, exit_layer: int
) -> None:
    for prompt in prompts:
        expected = autoregressive(lm, prompt, max_new_tokens=30, **processors)
        assert generate(lm, prompt, max_new_tokens=30, exit_layer=exit_layer, **processors) == expected


def test_no_ngram_occurs_twice_even_within_a_draft(lm: LanguageModel, prompts: list[list[int]]) -> None:
    text = prompts[0] + generate(lm, prompts[0], max_new_tokens=60, no_repeat_ngram_size=2, exit_layer=3)
    pairs = list(pairwise(text))
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("block_verification", [True, False])
def test_temperature_0_is_greedy(
    lm: LanguageModel, prompts: list[list[int]], acceptance: str, block_verification: bool
) -> None:
    expected = autoregressive(lm, prompts[1], max_new_tokens=24)
    options = {"max_new_tokens": 24, "temperature": 0, "do_sample": True, "top_k": 3, "seed": 5}
    assert autoregressive(lm, prompts[1], acceptance=acceptance, **options) == expected
    settings = {"acceptance": acceptance, "block_verification": block_verification, "exit_layer": 3}
    assert generate(lm, prompts[1], **settings, **options) == expected


def test_a_temperature_that_would_overflow_is_greedy(lm: LanguageModel, prompts: list[list[int]]) -> None:
    expected = autoregressive(lm, prompts[1], max_new_tokens=12)
    assert autoregressive(lm, prompts[1], max_new_tokens=12, temperature=1e-44) == expected


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("num_speculations", [1, 2, 4, 50])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_never_more_tokens_than_asked_for(
    lm: LanguageModel, prompts: list[list[int]], acceptance: str, num_speculations: int, max_new_tokens: int
) -> None:
    for exit_layer in (2, 5):
        (result,) = lm.generate(
            [prompts[0]],
            max_new_tokens=max_new_tokens,
            num_speculations=num_speculations,
            exit_layer=exit_layer,
            acceptance=acceptance,
            do_sample=True,
            seed=3,
        )
        assert len(result.token_ids) == max_new_tokens
        assert (result.finish_reason, result.stop_reason) == ("length", None)


class TestEndOfSequence:
    @pytest.fixture
    def mid_draft(
        self, lm: LanguageModel, prompts: list[list[int]], rounds_of: Callable[..., list[Event]]
    ) -> tuple[list[int], int, int]:
        """A prompt, and a token whose first occurrence is an accepted draft with accepted drafts after it."""
        for prompt in prompts:
            seen: set[int] = set(generate(lm, prompt, max_new_tokens=1))
            length = len(seen)
            for event in rounds_of(lm, prompt, max_new_tokens=40, exit_layer=3, num_speculations=4):
                for i, token in enumerate(event.tokens):
                    if 0 < i < event.num_accepted - 1 and token not in seen:
                        return prompt, token, length + i + 1
                    seen.add(token)
                length += len(event.tokens)
        raise AssertionError("no such token")

    def test_inside_an_accepted_draft(self, lm: LanguageModel, mid_draft: tuple[list[int], int, int]) -> None:
        prompt, eos, length = mid_draft
        options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": (eos,)}
        for exit_layer in EXITS:
            for num_speculations in (1, 2, 4, 8):
                (result,) = lm.generate([prompt], exit_layer=exit_layer, num_speculations=num_speculations, **options)
                assert result.token_ids == autoregressive(lm, prompt, **options)
                assert result.token_ids.index(eos) == length - 1 == len(result.token_ids) - 1
                assert (result.finish_reason, result.stop_reason) == ("stop", eos)
                assert result.stats.tokens == length

    def test_the_first_of_several_ids_counts(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        full = autoregressive(lm, prompts[1], max_new_tokens=40)
        eos = (full[-1], full[12], full[7], 47)
        end = min(i for i, token in enumerate(full) if token in eos)
        (result,) = lm.generate([prompts[1]], max_new_tokens=40, eos_token_ids=eos, exit_layer=3)
        assert result.token_ids == full[: end + 1]
        assert result.stop_reason == full[end]

    def test_ignored(self, lm: LanguageModel, mid_draft: tuple[list[int], int, int]) -> None:
        prompt, eos, length = mid_draft
        options = {"max_new_tokens": 40, "eos_token_ids": (eos,), "ignore_eos": True, "exit_layer": 3}
        (result,) = lm.generate([prompt], **options)
        assert result.token_ids == autoregressive(lm, prompt, max_new_tokens=40)
        assert len(result.token_ids) == 40 > length
        assert result.finish_reason == "length"

    def test_as_the_first_token(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        (first,) = generate(lm, prompts[1], max_new_tokens=1)
        (result,) = lm.generate([prompts[1]], max_new_tokens=10, eos_token_ids=(first,))
        assert result.token_ids == [first]
        assert (result.finish_reason, result.stats.rounds) == ("stop", 0)

    def test_as_the_last_token_allowed(self, lm: LanguageModel, mid_draft: tuple[list[int], int, int]) -> None:
        prompt, eos, length = mid_draft
        (result,) = lm.generate([prompt], max_new_tokens=length, eos_token_ids=(eos,), exit_layer=3)
        assert (result.finish_reason, result.stop_reason, len(result.token_ids)) == ("stop", eos, length)

    def test_the_checkpoints_own_ids_are_used(self, make_lm: Callable[..., LanguageModel]) -> None:
        lm = make_lm()
        full = autoregressive(lm, [7], max_new_tokens=20)
        lm.checkpoint.__dict__["eos_token_ids"] = (full[5],)
        cut = full[: full.index(full[5]) + 1]
        assert generate(lm, [7], max_new_tokens=20) == autoregressive(lm, [7], max_new_tokens=20) == cut
        assert generate(lm, [7], max_new_tokens=20, eos_token_ids=()) == full


@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("exit_layer", [2, 5])
def test_a_full_context_ends_the_text(lm: LanguageModel, room: int, exit_layer: int) -> None:
    """A prompt that leaves `room` tokens; a round never writes past them, whatever the draft length."""
    context = lm.decoder.max_context
    prompt = [(7 * i) % 48 for i in range(context - room)]
    expected = autoregressive(lm, prompt, max_new_tokens=500)
    assert len(expected) == room
    for num_speculations in (1, 3, 8):
        (result,) = lm.generate([prompt], max_new_tokens=500, num_speculations=num_speculations, exit_layer=exit_layer)
        assert result.token_ids == expected
        assert result.finish_reason == "length"


def test_drafts_never_write_past_the_capacity(
    make_lm: Callable[..., LanguageModel], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch slot behind the last one stays untouched by a lone row: it drafts no more than it can use."""
    caches, lm = [], make_lm()
    choose = Decoder.choose

    def spy(self: Decoder, inputs: Tensor, positions: Any, cache: Any, *rest: Any) -> Tensor:
        assert cache.lengths[0] + inputs.shape[1] <= cache.capacity
        caches.append(cache)
        return choose(self, inputs, positions, cache, *rest)

    monkeypatch.setattr(Decoder, "choose", spy)
    lm.generate([prompts[1]], max_new_tokens=13, num_speculations=8, exit_layer=3)
    cache = caches[-1]
    assert cache.capacity == len(prompts[1]) + 13
    assert not cache.keys[:, :, -1].any()
