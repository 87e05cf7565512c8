"""The network's verbs: three primitives, and compositions of them that give the same, whatever computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import Entry, entries_of
from torch import Tensor

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, StopRule
from layerskip.model.finite import best_tokens
from layerskip.model.native.library import load_library

LAYERS = 4
TOKENS = [5, 9]


@pytest.fixture(scope="module", params=["torch", "native", "static", "capped"])
def decoder(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], load_static: Callable[[Path], LanguageModel]
) -> Decoder:
    """One of each kind; `capped` are native layers below logits that are capped, which kernels don't choose from."""
    if request.param == "static":
        return load_static(tiny_checkpoint()).decoder
    if request.param == "torch":
        return layerskip.load(str(tiny_checkpoint()), device="cpu", kernels="torch").decoder
    if load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    config: tuple[Any, ...] = ("gemma3_text",) if request.param == "capped" else ()
    options = {"final_logit_softcapping": 2.0} if config else {}
    return layerskip.load(str(tiny_checkpoint(*config, **options)), device="cpu", kernels="native").decoder


@torch.inference_mode()
def read_cache(decoder: Decoder) -> KVCache:
    """Two rows of different lengths."""
    cache = decoder.new_cache(2, 40)
    prompts = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    decoder.run_layers(decoder.embed(prompts), decoder.place(cache, [0, 0], 5), cache, 0, LAYERS)
    cache.commit(0, 5)
    cache.commit(1, 3)
    return cache


@torch.inference_mode()
def logits_after(decoder: Decoder, cache: KVCache, tokens: Tensor, offset: int = 0, stop: int = LAYERS) -> Tensor:
    """By the primitives."""
    positions = decoder.place(cache, [length + offset for length in cache.lengths], tokens.shape[1])
    return decoder.unembed(decoder.run_layers(decoder.embed(tokens), positions, cache, 0, stop))


def test_layers_may_be_run_in_parts(decoder: Decoder) -> None:
    cache, tokens = read_cache(decoder), torch.tensor([[5, 6, 7], [8, 9, 1]])
    positions = decoder.place(cache, cache.lengths, 3)
    with torch.inference_mode():
        whole = decoder.run_layers(decoder.embed(tokens), positions, cache, 0, LAYERS)
        last, states = decoder.run_exits(decoder.embed(tokens), positions, cache, 0, LAYERS, [3, 1, LAYERS])
        assert torch.equal(last, whole)
        assert list(states) == [1, 3, LAYERS]
        for exit_layer, state in states.items():
            assert torch.equal(state, decoder.run_layers(decoder.embed(tokens), positions, cache, 0, exit_layer))
        onwards, passed = decoder.run_exits(states[1], positions, cache, 1, LAYERS, [1, 2, 99])
        assert torch.equal(onwards, whole)
        assert list(passed) == [2]  # those above the start, up to the end
        assert torch.equal(decoder.run_layers(whole, positions, cache, LAYERS, LAYERS), whole)


@pytest.mark.parametrize("stop", [2, LAYERS])
def test_choosing_takes_the_most_likely_token(decoder: Decoder, stop: int) -> None:
    cache, tokens = read_cache(decoder), torch.tensor([[5, 6, 7], [8, 9, 1]])
    positions = decoder.place(cache, cache.lengths, 3)
    expected = best_tokens(logits_after(decoder, cache, tokens, stop=stop))
    with torch.inference_mode():
        assert torch.equal(decoder.choose(tokens, positions, cache, 0, stop), expected)
        hidden = decoder.run_layers(decoder.embed(tokens), positions, cache, 0, 1)
        assert torch.equal(decoder.choose(hidden, positions, cache, 1, stop), expected)
    assert cache.lengths == [5, 3]


@pytest.mark.parametrize("exit_layer", [1, 3, LAYERS])
@pytest.mark.parametrize("num_drafts", [1, 4])
def test_drafts_are_chosen_one_after_the_other(decoder: Decoder, exit_layer: int, num_drafts: int) -> None:
    cache = read_cache(decoder)
    token, expected = torch.tensor([[5], [9]]), []
    for i in range(num_drafts):
        token = best_tokens(logits_after(decoder, cache, token, i, exit_layer))
        expected.append(token)
    again = read_cache(decoder)
    with torch.inference_mode():
        drafts = decoder.draft(
            torch.tensor([[5], [9]]), again, DraftRequest(exit_layer=exit_layer, num_drafts=num_drafts)
        )
        assert torch.equal(drafts.tokens, torch.cat(expected, 1))
        assert drafts.exit_layer == exit_layer
        assert drafts.hidden is not None
        assert drafts.hidden.shape == (2, num_drafts + 1, 32)
        assert drafts.confidences == ()
        assert again.lengths == [5, 3]
        # Verification goes on from the states: targets are those of all layers over the same tokens.
        positions = decoder.place(again, again.lengths, num_drafts + 1)
        targets = decoder.choose(drafts.hidden, positions, again, exit_layer, LAYERS)
        tokens = torch.cat((torch.tensor([[5], [9]]), drafts.tokens), 1)
    assert torch.equal(targets, best_tokens(logits_after(decoder, read_cache(decoder), tokens)))


def test_a_stop_rule_ends_drafts(decoder: Decoder) -> None:
    """After the first, once their probability of being accepted together is too low."""
    cache, rates = read_cache(decoder), (0.5,) * CONFIDENCE_CLASSES
    with torch.inference_mode():
        found = {
            least: decoder.draft(
                torch.tensor([[5], [9]]),
                cache,
                DraftRequest(exit_layer=2, num_drafts=5, stop=StopRule(rates=rates, least=least)),
            )
            for least in (0.9, 0.2, 0.1, 0.0)
        }
    assert {least: drafts.tokens.shape[1] for least, drafts in found.items()} == {0.9: 1, 0.2: 3, 0.1: 4, 0.0: 5}
    assert torch.equal(found[0.0].tokens[:, :3], found[0.2].tokens)
    for drafts in found.values():
        assert [len(row) for row in drafts.confidences] == [drafts.tokens.shape[1]] * 2
        assert all(0 < confidence <= 1.001 for row in drafts.confidences for confidence in row)
    if decoder.kernels == "native" and decoder.config.final_logit_softcapping is not None:
        return  # kernels tell the probabilities that uncapped logits give; classes of drafts are learned from either
    first = logits_after(decoder, cache, torch.tensor([[5], [9]]), stop=2).softmax(-1).amax(-1).flatten()
    torch.testing.assert_close(torch.tensor([row[0] for row in found[0.9].confidences]), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exit_layer", [1, 2, LAYERS])
def test_a_round_drafts_and_verifies(decoder: Decoder, exit_layer: int) -> None:
    cache, log = read_cache(decoder), list[Entry]()
    decoder.calls.observer = entries_of(log)
    calls = decoder.layer_calls
    try:
        with torch.inference_mode():
            round_ = decoder.round(TOKENS, cache, DraftRequest(exit_layer=exit_layer, num_drafts=3), LAYERS)
    finally:
        decoder.calls.observer = None
    cost = 4 * exit_layer + LAYERS - exit_layer
    assert decoder.layer_calls - calls == len(log) == cost
    assert cache.lengths == [5, 3]
    tokens = torch.tensor([[token, *drafts] for token, drafts in zip(TOKENS, round_.drafts, strict=True)])
    assert tokens.shape == (2, 4)
    assert best_tokens(logits_after(decoder, read_cache(decoder), tokens)).tolist() == round_.targets
    assert best_tokens(logits_after(decoder, cache, tokens[:, :1], stop=exit_layer))[:, 0].tolist() == [
        drafts[0] for drafts in round_.drafts
    ]
    assert round_.seconds_drafting > 0
    assert round_.seconds_verifying > 0 or exit_layer == LAYERS


@pytest.mark.parametrize("num_layers", [2, LAYERS])
def test_a_round_without_drafts_is_a_step(decoder: Decoder, num_layers: int) -> None:
    cache = read_cache(decoder)
    with torch.inference_mode():
        round_ = decoder.round(TOKENS, cache, DraftRequest(exit_layer=0, num_drafts=0), num_layers)
    assert round_.drafts == [[], []]
    expected = best_tokens(logits_after(decoder, cache, torch.tensor([[5], [9]]), stop=num_layers))
    assert round_.targets == expected.tolist()
    assert round_.seconds_drafting == 0
    assert round_.seconds_verifying > 0


def test_rounds_of_a_view_are_those_of_its_rows(decoder: Decoder) -> None:
    cache, request = read_cache(decoder), DraftRequest(exit_layer=2, num_drafts=3)
    with torch.inference_mode():
        both = decoder.round(TOKENS, cache, request, LAYERS)
        second = decoder.round(TOKENS[1:], read_cache(decoder).view(1, 2), request, LAYERS)
    assert (second.drafts, second.targets) == (both.drafts[1:], both.targets[1:])


def test_what_is_uncounted(decoder: Decoder) -> None:
    cache, log = read_cache(decoder), list[Entry]()
    before, observer = decoder.layer_calls, entries_of(log)
    decoder.calls.observer = observer
    try:
        with decoder.uncounted(), torch.inference_mode():
            decoder.round(TOKENS, cache, DraftRequest(exit_layer=2, num_drafts=2), LAYERS)
        assert (decoder.layer_calls, log) == (before, [])
        assert decoder.calls.observer is observer
    finally:
        decoder.calls.observer = None
