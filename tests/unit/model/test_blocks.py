"""Weights that stay in the blocks of a GGUF file: the same numbers, row by row the same products, the same text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_files import convert, tiny_sizes
from k_quants import quantize
from torch import Tensor

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.blocks import (
    BLOCK_BYTES,
    BlockFormat,
    BlockWeight,
    block_bytes,
    block_weights,
    in_blocks,
    int8_rows,
    stacked,
)
from layerskip.model.native.joined import JoinedLinear, can_join
from layerskip.model.native.library import COMPUTE, load_library
from layerskip.model.native.linear import NativeLinear
from layerskip.model.native.network import NativeNetwork

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
FORMATS: list[BlockFormat] = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
WITH_MINIMA = ("q4_1", "q5_1", "q4_k", "q5_k")
TOKENS = [5, 3, 80, 41, 9, 9, 17, 62, 33, 21, 2, 70]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_weight(format_: BlockFormat, outputs: int, groups: int, seed: int = 0) -> BlockWeight:
    """A random weight of so many blocks in a row, as converters would write it."""
    inputs = groups * block_weights(format_)
    data = quantize(random(outputs, inputs, seed=seed).numpy(), GGMLQuantizationType[format_.upper()])
    return BlockWeight(format_, torch.from_numpy(data))


@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_are_the_gguf_package_s(format_: BlockFormat) -> None:
    weight = block_weight(format_, 48, 3)
    assert weight.shape == (48, 3 * block_weights(format_))
    expected = dequantize(weight.data.numpy(), GGMLQuantizationType[format_.upper()])
    assert np.array_equal(weight.dequantize().numpy(), expected)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(weight.rows(order).dequantize().numpy(), expected[order])


def test_extreme_scales() -> None:
    """Subnormal, largest and negative scales, and numbers at both ends."""
    scales = torch.tensor([6e-8, 65504.0, -1.5, 0.0, 6.1e-5], dtype=torch.float16)
    for format_ in FORMATS:
        data = torch.randint(0, 256, (16, len(scales), BLOCK_BYTES[format_]), dtype=torch.uint8)
        place = BLOCK_BYTES[format_] - 2 if format_ == "q6_k" else 0
        data[..., place : place + 2] = scales.view(-1, 1).view(torch.uint8)
        if format_ in WITH_MINIMA:
            data[..., 2:4] = scales.flip(0).view(-1, 1).view(torch.uint8)
        weight = BlockWeight(format_, data.flatten(1))
        x = torch.eye(weight.shape[1])
        assert torch.equal(NativeLinear(weight)(x).t(), weight.dequantize())


@pytest.mark.parametrize("format_", FORMATS)
def test_scales_that_are_not_numbers(format_: BlockFormat) -> None:
    """They spoil the outputs that have them, and no others."""
    weight = block_weight(format_, 40, 2)
    place = BLOCK_BYTES[format_] - 2 if format_ == "q6_k" else 0
    for output, value in ((3, float("nan")), (17, float("inf"))):
        weight.data[output, place : place + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    x = random(3, weight.shape[1])
    spoiled = torch.zeros(40, dtype=torch.bool)
    spoiled[[3, 17]] = True
    for compute in ("float32", "int8"):
        result = NativeLinear(weight, compute=compute)(x)
        assert torch.equal(result.isfinite(), ~spoiled.expand(3, -1))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("outputs", "groups"), [(16, 1), (48, 3), (70, 2), (333, 5)])
def test_products(format_: BlockFormat, outputs: int, groups: int, threads: int) -> None:
    weight, bias = block_weight(format_, outputs, groups), random(outputs, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear, plain = NativeLinear(weight, bias=bias), NativeLinear(weight)
        for rows in (1, 2, 3, 4, 5, 6, 7, 9, 13, 70):
            x = random(rows, weight.shape[1], seed=rows)
            wanted = (x.double() @ weight.dequantize().double().t()).float()
            torch.testing.assert_close(plain(x), wanted, rtol=2e-5, atol=1e-4)
            torch.testing.assert_close(linear(x), wanted + bias, rtol=2e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(format_: BlockFormat) -> None:
    linear = NativeLinear(block_weight(format_, 208, 3))
    x = random(17, linear.view.inputs, seed=1)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for rows in (2, 3, 5, 6, 7, 17):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@pytest.mark.parametrize("format_", FORMATS)
def test_bytes_are_those_of_the_file(format_: BlockFormat) -> None:
    weight = block_weight(format_, 64, 3)
    more = 4 if format_ in ("q4_k", "q5_k") else 0  # scales and minima of six bits take a byte each
    assert NativeLinear(weight).num_bytes == weight.data.numel() + more * 64 * 3


@pytest.mark.parametrize("format_", FORMATS)
def test_alternating_panels(format_: BlockFormat) -> None:
    gate, up = (block_weight(format_, 48, 2, seed) for seed in (0, 1))
    x = random(3, gate.shape[1])
    panels = NativeLinear(gate, up)(x).view(3, 3, 2, 16)
    both = NativeLinear(stacked([gate, up]))(x)
    assert torch.equal(panels[:, :, 0].flatten(1), both[:, :48])
    assert torch.equal(panels[:, :, 1].flatten(1), both[:, 48:])


@pytest.mark.parametrize("compute", ["float32", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_a_product_in_formats_of_their_own(compute: str, threads: int) -> None:
    """Each part's results are those that it has alone, wherever a thread's share begins and ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bias = random(48, seed=9)
        options = {"bias": bias, "compute": compute}
        parts = [
            NativeLinear(block_weight("q4_k", 48, 1), **options),
            NativeLinear(block_weight("q6_k", 48, 1), **options),
        ]
        last = NativeLinear(block_weight("q8_0", 5, 8), compute=compute)
        stacked_, alternating = JoinedLinear([*parts, last]), JoinedLinear(parts, alternate=True)
        assert stacked_.num_bytes == sum(part.num_bytes for part in (*parts, last))
        assert (stacked_.storage, stacked_.view.compute) == ("q4_k+q6_k+q8_0", COMPUTE[compute])
        for rows in (1, 2, 5, 23):
            x = random(rows, 256, seed=rows)
            alone = [part(x) for part in (*parts, last)]
            assert torch.equal(stacked_(x), torch.cat(alone, -1))
            panels = alternating(x).view(rows, 3, 2, 16)
            assert torch.equal(panels[:, :, 0].flatten(1), alone[0])
            assert torch.equal(panels[:, :, 1].flatten(1), alone[1])
    finally:
        torch.set_num_threads(before)


def test_which_parts_fit_together() -> None:
    assert can_join([32, 16, 5], alternate=False)
    assert not can_join([24, 16], alternate=False)
    assert can_join([24, 24], alternate=True)
    assert not can_join([32, 16], alternate=True)


def test_float16_is_taken_where_it_loses_nothing() -> None:
    weight = random(32, 64).half().float()
    weight[0, :4] = torch.tensor([6e-8, -6.1e-5, 65504.0, -0.0]).half().float()
    exact = NativeLinear(weight)
    assert (exact.storage, exact.num_bytes) == ("float16", weight.numel() * 2)
    assert torch.equal(exact(torch.eye(64)).t(), weight)
    for value in (70000.0, 1e-8, 1.0001):
        changed = weight.clone()
        changed[3, 5] = value
        assert NativeLinear(changed).storage == "float32"


FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
Kept = tuple[LanguageModel, LanguageModel]


KINDS = [(family, name) for family in FAMILIES for name in ("Q8_0", "Q4_0", "Q4_1")]
KINDS += [
    (family, name)
    for family in ("llama", "gemma3_text", "qwen3_moe")
    for name in ("Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
]


@pytest.fixture(params=KINDS, ids=str)
def kept(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Kept:
    """A model whose weights stay in blocks, and the same in torch, dequantized."""
    family, name = request.param
    folder = tiny_checkpoint(family, **tiny_sizes(name) | FAMILIES[family])
    path = convert(folder, tmp_path_factory.mktemp("gguf") / "model.gguf", type_=GGMLQuantizationType[name])
    kernels = ("native", "torch")
    native, dequantized = (layerskip.load(str(path), dtype="float32", device="cpu", kernels=k) for k in kernels)
    return native, dequantized


def test_a_network_with_the_numbers_of_the_file(kept: Kept) -> None:
    ours, dequantized = kept
    torch.testing.assert_close(ours.logits(TOKENS), dequantized.logits(TOKENS), rtol=1e-4, atol=1e-4)
    network = ours.decoder._network
    assert isinstance(network, NativeNetwork)
    storages = {
        linear.storage
        for layer in network.layers
        for linear in (layer.qkv, layer.o, *(linear for pair in layer.gated for linear in pair))
    }
    assert {*storages, network.head.storage} <= {*FORMATS}


def test_speculation_changes_nothing(kept: Kept) -> None:
    lm = kept[0]
    for options in ({"do_sample": False}, {"temperature": 0.9, "seed": 3}):
        plain = lm.generate([TOKENS], generation_strategy="autoregressive", max_new_tokens=24, **options)[0]
        for exit_layer in range(1, lm.decoder.num_layers):
            for drafts in (1, 3, 6):
                result = lm.generate(
                    [TOKENS],
                    generation_strategy="self_speculative",
                    exit_layer=exit_layer,
                    num_speculations=drafts,
                    max_new_tokens=24,
                    **options,
                )[0]
                assert result.token_ids == plain.token_ids


def test_parts_of_a_weight_in_different_formats(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Each keeps its own; but for what is in no blocks, which makes all of them float32."""
    folder = tiny_checkpoint(**tiny_sizes("Q4_K"))
    for one, other, storage in (
        ("Q8_0", "Q4_0", "q8_0+q4_0"),
        ("Q5_0", "Q8_0", "q5_0+q8_0"),
        ("Q4_K", "Q6_K", "q4_k+q6_k"),
        ("Q5_K", "Q4_1", "q5_k+q4_1"),
        ("Q4_K", "F32", "float32"),
    ):
        path = convert(
            folder,
            tmp_path / f"{one}-{other}.gguf",
            type_=GGMLQuantizationType[one],
            types={"attn_v": GGMLQuantizationType[other], "ffn_up": GGMLQuantizationType[other]},
        )
        ours, dequantized = (
            layerskip.load(str(path), dtype="float32", device="cpu", kernels=k) for k in ("native", "torch")
        )
        network = ours.decoder._network
        assert isinstance(network, NativeNetwork)
        assert (network.layers[0].qkv.storage, network.layers[0].gate_up.storage) == (storage, storage)
        torch.testing.assert_close(ours.logits(TOKENS), dequantized.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_quantizing_anew(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Other bits are made of the numbers that the blocks stand for; drafts in fewer bits change nothing."""
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=96)
    path = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q8_0)
    other = layerskip.load(str(path), device="cpu", quantize="int4").decoder._network
    assert isinstance(other, NativeNetwork)
    assert other.head.storage == "int4"
    texts = [
        layerskip.load(str(path), device="cpu", quantize_draft=bits).generate(
            [TOKENS], generation_strategy="self_speculative", exit_layer=2, num_speculations=3, max_new_tokens=16,
            do_sample=False,
        )[0].token_ids
        for bits in (None, "int8")
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_memory_is_counted_in_the_file_s_bytes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerskip.checkpoint.loading import plan as plan_module

    folder = tiny_checkpoint(hidden_size=64, intermediate_size=96)
    path = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q4_0)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 2 * path.stat().st_size)
    layerskip.load(str(path), device="cpu")
    with pytest.raises(layerskip.LayerSkipError, match="needs"):
        layerskip.load(str(path), device="cpu", kernels="torch")


@pytest.mark.parametrize("outputs", [1, 33])
def test_rows_of_int8_are_numbers_times_a_scale(outputs: int) -> None:
    numbers = torch.randint(-128, 128, (outputs, 40), dtype=torch.int8)
    scales = torch.rand(1, outputs).t()  # as GPTQ's scales lie in memory
    weight = int8_rows(numbers, scales)
    assert weight.shape == (outputs, 40)
    assert weight.data.nbytes == block_bytes("int8", outputs, 40)
    assert torch.equal(weight.dequantize(), numbers.float() * scales)
    padded = weight.padded(16)
    assert padded.shape == (outputs, 48)
    assert torch.equal(padded.dequantize()[:, :40], weight.dequantize())
    assert not padded.dequantize()[:, 40:].any()


@pytest.mark.parametrize(("format_", "limit"), [("int4", 8), ("q4_0", 8), ("q8_0", 128)])
def test_numbers_and_scales_become_blocks(format_: BlockFormat, limit: int) -> None:
    numbers = torch.randint(-limit, limit, (5, 64), dtype=torch.int8)
    scales = torch.rand(2, 5).to(torch.bfloat16 if format_ == "int4" else torch.float16).t()
    weight = in_blocks(format_, numbers, scales)
    assert weight.data.nbytes == block_bytes(format_, 5, 64)
    assert torch.equal(weight.dequantize(), numbers.float() * scales.float().repeat_interleave(32, 1))
    assert weight.padded(16) is weight


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_kernels_multiply_blocks_as_they_multiply_what_they_quantize(storage: str) -> None:
    weight = torch.randn(40, 64)
    if storage == "int8":
        scales = weight.abs().amax(1) / 127
        blocks = int8_rows((weight / scales[:, None]).round().to(torch.int8), scales)
    else:
        steps = (weight.view(40, 2, 32).abs().amax(-1) / 7).bfloat16()
        numbers = (weight.view(40, 2, 32) / steps.float().unsqueeze(-1)).round().clamp(-8, 7)
        blocks = in_blocks("int4", numbers.to(torch.int8).flatten(1), steps)
    x = torch.randn(3, 64)
    kept = NativeLinear(blocks)
    assert kept.storage == storage
    assert torch.equal(kept(x), NativeLinear(weight, storage=storage)(x))
    torch.testing.assert_close(kept(x), x @ blocks.dequantize().t(), rtol=1e-4, atol=1e-4)
