"""From named tensors to a network: which names and shapes are asked for, and how they are stacked."""

import pytest
import torch
import torch.nn.functional as F
from tensor_sources import Tensors, make_source
from torch import Tensor

from layerskip.checkpoint.loading.network import load_decoder
from layerskip.checkpoint.loading.plan import LoadingPlan
from layerskip.errors import WeightsError
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder
from layerskip.model.torch.linear import WIDE, DenseLinear, OneDNNLinear, has_onednn
from layerskip.model.torch.network import TorchNetwork

CPU = torch.device("cpu")


def load(config: ModelConfig, source: Tensors, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(config, source, LoadingPlan(dtype=dtype, device=CPU, context=16))


def network_of(decoder: Decoder) -> TorchNetwork:
    assert isinstance(decoder._network, TorchNetwork)
    return decoder._network


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_is_used(model_type: str) -> None:
    config, source = make_source(model_type)
    load(config, source)
    assert set(source.read) == source.names()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stacking_order(dtype: torch.dtype) -> None:
    config, source = make_source(attention_bias=True, mlp_bias=True)
    decoder = load(config, source, dtype)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    def apply(name: str) -> Tensor:
        return F.linear(x, source.tensors[name + ".weight"], source.tensors[name + ".bias"])

    for index, layer in enumerate(network_of(decoder).layers):
        prefix = f"model.layers.{index}."
        qkv = torch.cat([apply(f"{prefix}self_attn.{part}_proj") for part in "qkv"], -1)
        gate_up = torch.cat([apply(f"{prefix}mlp.{part}_proj") for part in ("gate", "up")], -1)
        for ours, wanted in ((layer.qkv, qkv), (layer.gate_up, gate_up), (layer.o, apply(prefix + "self_attn.o_proj"))):
            out = ours(x.to(dtype))
            assert out.dtype == dtype
            error = float((out.float() - wanted).norm() / wanted.norm())
            assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_fused_checkpoints_are_taken_as_they_are() -> None:
    config, source = make_source("phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert source.tensors[name].shape == ((4 + 2 * 2) * 8, 32)
    x = torch.ones(1, 32)
    torch.testing.assert_close(network_of(load(config, source)).layers[1].qkv(x), F.linear(x, source.tensors[name]))


def test_norms_stay_in_float32_and_carry_the_family_s_offset() -> None:
    for model_type, offset in (("llama", 0.0), ("gemma3_text", 1.0)):
        config, source = make_source(model_type)
        decoder = load(config, source, torch.bfloat16)
        stored = source.tensors["model.layers.0.input_layernorm.weight"]
        assert torch.equal(network_of(decoder).layers[0].attention_norm, stored + offset)
        assert torch.equal(network_of(decoder).final_norm, source.tensors["model.norm.weight"] + offset)


def test_a_tied_head_is_the_embedding_table() -> None:
    config, source = make_source(tie_word_embeddings=True)
    assert "lm_head.weight" not in source.names()
    hidden = torch.randn(1, 2, 32)
    normed = F.rms_norm(hidden, (32,), source.tensors["model.norm.weight"], config.rms_norm_eps)
    wanted = normed @ source.tensors["model.embed_tokens.weight"].t()
    torch.testing.assert_close(load(config, source).unembed(hidden), wanted)


def test_a_tied_table_that_is_not_packed_is_held_once() -> None:
    config, source = make_source(tie_word_embeddings=True)
    decoder = load(config, source, torch.float16)
    assert isinstance(network_of(decoder).head, DenseLinear)
    assert network_of(decoder).head.weight is decoder._embedding
    assert decoder._embedding.dtype == torch.float16


def test_a_wide_tied_table_is_held_once_and_is_no_view_of_the_file() -> None:
    config, source = make_source(tie_word_embeddings=True, hidden_size=WIDE)
    decoder = load(config, source)
    if not has_onednn(decoder.device, decoder.dtype):
        pytest.skip("oneDNN multiplies nothing here")
    assert isinstance(network_of(decoder).head, OneDNNLinear)
    assert network_of(decoder).head.weight is decoder._embedding
    hidden, tokens, cache = torch.randn(1, 2, WIDE), torch.tensor([[1, 2]]), decoder.new_cache(1, 4)
    normed = F.rms_norm(hidden, (WIDE,), source.tensors["model.norm.weight"], config.rms_norm_eps)
    wanted = normed @ source.tensors["model.embed_tokens.weight"].t()
    torch.testing.assert_close(decoder.unembed(hidden), wanted, rtol=1e-4, atol=1e-4)

    def run() -> Tensor:
        return decoder.run_layers(decoder.embed(tokens), decoder.place(cache, [0], 2), cache, 0, 2)

    before = run()
    for tensor in source.tensors.values():
        tensor.zero_()
    assert torch.equal(run(), before)


def test_plain_weights_are_copies() -> None:
    """Not views of the file, which may change or go."""
    config, source = make_source()
    source.tensors = {name: tensor.half() for name, tensor in source.tensors.items()}
    decoder = load(config, source, torch.float16)
    tokens, cache = torch.tensor([[1, 2]]), decoder.new_cache(1, 4)

    def run() -> Tensor:
        hidden = decoder.run_layers(decoder.embed(tokens), decoder.place(cache, [0], 2), cache, 0, 2)
        return decoder.unembed(hidden)

    before = run()
    for tensor in source.tensors.values():
        tensor.zero_()
    assert torch.equal(run(), before)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
)
def test_bad_tensors(name: str) -> None:
    config, source = make_source()
    good = source.tensors[name]
    source.tensors[name] = torch.cat((good, good))
    with pytest.raises(WeightsError) as error:
        load(config, source)
    for words in (repr(name), str((2 * good.shape[0], *good.shape[1:])), str(tuple(good.shape))):
        assert words in str(error.value)
    source.tensors[name] = good.to(torch.int8)
    with pytest.raises(WeightsError, match=r"torch.int8; weights must be floating point") as error:
        load(config, source)
    assert repr(name) in str(error.value)
