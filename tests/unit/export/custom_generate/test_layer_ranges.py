"""Parts of a model are run by the model's own code, once for each token."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerskip.export.custom_generate import decoding
from layerskip.export.custom_generate.generate import generate
from layerskip.export.custom_generate.layer_ranges import LayerRanges

LAYERS, EXIT, DRAFTS = 5, 2, 4


@contextmanager
def counting(model: Any) -> Iterator[tuple[Counter[int], Counter[int]]]:
    """Calls of each layer, and tokens that went through it."""
    calls: Counter[int] = Counter()
    tokens: Counter[int] = Counter()

    def count(index: int, states: Tensor) -> None:
        calls[index] += 1
        tokens[index] += states.shape[1]

    handles = [
        layer.register_forward_pre_hook(lambda _, args, index=index: count(index, args[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield calls, tokens
    finally:
        for handle in handles:
            handle.remove()


def test_a_round_calls_early_layers_for_each_token_and_late_layers_once(
    agreeing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_rounds: list[int] = []
    run_round = decoding.Decoder._round
    ids = torch.arange(3, 12).unsqueeze(0)
    with counting(agreeing) as (calls, tokens):

        def counted(decoder: decoding.Decoder) -> None:
            before = calls.total()
            run_round(decoder)
            in_rounds.append(calls.total() - before)

        monkeypatch.setattr(decoding.Decoder, "_round", counted)
        generate(ids, model=agreeing, exit_layer=EXIT, num_speculations=DRAFTS, max_new_tokens=40, pad_token_id=0)
    assert len(in_rounds) > 5
    assert set(in_rounds[:-DRAFTS]) == {(DRAFTS + 1) * EXIT + (LAYERS - EXIT)}
    # All layers see the same tokens, and no layer sees one twice in a round.
    assert len(set(tokens.values())) == 1
    assert tokens[0] == 9 + sum((count - (LAYERS - EXIT)) // EXIT for count in in_rounds)


def test_the_model_stays_as_it_is(agreeing: Any) -> None:
    before = {name: id(module) for name, module in agreeing.named_modules()}
    LayerRanges(agreeing, 2)
    assert {name: id(module) for name, module in agreeing.named_modules()} == before
    assert isinstance(agreeing.model.layers, nn.ModuleList)


def test_forwards_of_instances_are_left_behind(agreeing: Any) -> None:
    """accelerate replaces `forward` of each module by a function that is bound to that module."""
    ids = torch.arange(3, 12).unsqueeze(0)
    expected = generate(ids, model=agreeing, exit_layer=EXIT, max_new_tokens=20, pad_token_id=0)
    agreeing.model.forward = agreeing.model.forward
    try:
        with counting(agreeing) as (_, tokens):
            output = generate(ids, model=agreeing, exit_layer=EXIT, max_new_tokens=20, pad_token_id=0)
    finally:
        del agreeing.model.forward
    assert torch.equal(output, expected)
    assert len(set(tokens.values())) == 1


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("qwen3_next", {"num_experts": 4, "head_dim": 8}, "linear_attention"),
        ("rwkv", {"attention_hidden_size": 16}, "a recurrent one"),
        ("mamba", {"state_size": 4}, "linear_attention"),
        ("t5", {}, "has an encoder"),
    ],
)
def test_models_that_cannot_be_run_in_parts_are_refused(model_type: str, config: dict[str, Any], message: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 16}
    kind = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(model_type, **sizes, **config))
    with pytest.raises(ValueError, match=message):
        LayerRanges(model, 2)


def test_layers_that_share_keys_are_refused(agreeing: Any) -> None:
    agreeing.config.num_kv_shared_layers = 2
    try:
        with pytest.raises(ValueError, match="use the keys and values of others"):
            LayerRanges(agreeing, 2)
    finally:
        del agreeing.config.num_kv_shared_layers


def test_a_model_without_a_list_of_layers_is_refused(agreeing: Any, family: Callable[[str], Any]) -> None:
    agreeing.config.num_hidden_layers = 3
    try:
        with pytest.raises(ValueError, match="has one list of 3 modules"):
            LayerRanges(agreeing, 2)
    finally:
        agreeing.config.num_hidden_layers = LAYERS
