"""Quantized checkpoints of other programs stand for exactly the numbers that their layouts say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import describe, quantize_folder, set_quantization
from safetensors.torch import load_file, save_file

from layerskip import load
from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.loading.tensors import Part
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.errors import UnsupportedModelError, WeightsError
from layerskip.model.native.library import load_library

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
KINDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("pack-quantized", {"bits": 4, "group_size": 32, "dtype": BF16}, "int4"),
    ("pack-quantized", {"bits": 4, "group_size": 32, "dtype": F16}, "q4_0"),
    ("pack-quantized", {"bits": 4, "group_size": 64, "dtype": BF16}, "int4"),
    ("pack-quantized", {"bits": 4, "group_size": 16, "dtype": F16}, None),
    ("pack-quantized", {"bits": 4, "group_size": None, "dtype": F32}, "int8"),
    ("pack-quantized", {"bits": 4, "group_size": 32, "dtype": F16, "symmetric": False}, "q8_0"),
    ("pack-quantized", {"bits": 4, "group_size": None, "dtype": BF16, "symmetric": False}, "int8"),
    ("pack-quantized", {"bits": 8, "group_size": 32, "dtype": F16}, "q8_0"),
    ("pack-quantized", {"bits": 8, "group_size": 32, "dtype": BF16, "symmetric": False}, None),
    ("int-quantized", {"bits": 8, "group_size": None, "dtype": BF16}, "int8"),
    ("int-quantized", {"bits": 8, "group_size": None, "dtype": F32}, "int8"),
    ("int-quantized", {"bits": 8, "group_size": None, "dtype": F32, "symmetric": False}, None),
    ("int-quantized", {"bits": 8, "group_size": 32, "dtype": F32}, None),
    ("int-quantized", {"bits": 4, "group_size": 32, "dtype": BF16}, "int4"),
    ("gptq", {"bits": 4, "group_size": 32}, "q4_0"),
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": False}, "q8_0"),
    ("gptq", {"bits": 4, "group_size": None}, "q4_0"),
    ("gptq", {"bits": 8, "group_size": 32}, "q8_0"),
    ("awq", {"bits": 4, "group_size": 32}, "q8_0"),
    ("awq", {"bits": 4, "group_size": 64, "symmetric": False}, "int8"),  # one group
    ("torchao", {"bits": 8, "group_size": None, "dtype": BF16}, "int8"),
    ("torchao", {"bits": 8, "group_size": None, "dtype": BF16, "symmetric": False}, None),
    ("torchao", {"bits": 4, "group_size": 32, "dtype": BF16}, "int4"),
    ("torchao", {"bits": 4, "group_size": 32, "dtype": F16, "symmetric": False}, "q8_0"),
]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
NAME = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tie_word_embeddings=False, **SIZES)


def write(plain: Path, tmp_path: Path, kind: str = "gptq", **options: Any) -> tuple[Path, Path]:
    options = {"bits": 4, "group_size": 32, **options}
    return tmp_path / "quantized", quantize_folder(plain, tmp_path / "quantized", kind, **options)


@pytest.mark.parametrize(("kind", "options", "blocks"), KINDS)
def test_numbers_are_those_of_the_layout(
    plain: Path, tmp_path: Path, kind: str, options: dict[str, Any], blocks: str | None
) -> None:
    quantized, floats = write(plain, tmp_path, kind, **options, head=True)
    source, meant = open_checkpoint(str(quantized)).weights, load_file(floats / "model.safetensors")
    assert source.names() == meant.keys()
    for name, weight in meant.items():
        assert source.stored(name).shape == tuple(weight.shape)
        assert torch.equal(source.get(name), weight), name
    weight = meant[NAME]
    assert torch.equal(source.get(NAME, Part.rows(5, 19)), weight[5:19])
    assert torch.equal(source.get(NAME, Part.columns(5, 19)), weight[:, 5:19])
    assert source.block_format(NAME) == blocks
    if blocks is not None:
        assert torch.equal(source.blocks(NAME).dequantize(), weight)
        assert torch.equal(source.blocks(NAME, Part.rows(5, 19)).dequantize(), weight[5:19])
        assert torch.equal(source.blocks(NAME, Part.columns(32, 64)).dequantize(), weight[:, 32:64])


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("kind", "options", "blocks"), [KINDS[i] for i in (0, 5, 9, 14, 18, 21)])
def test_texts_are_those_of_the_numbers(
    plain: Path, tmp_path: Path, kind: str, options: dict[str, Any], blocks: str | None, kernels: str
) -> None:
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    quantized, floats = write(plain, tmp_path, kind, **options)
    one, other = (load(str(folder), device="cpu", dtype="float32", kernels=kernels) for folder in (quantized, floats))
    prompt = [list(range(3, 40))]
    for strategy in ({}, {"exit_layer": 1, "num_speculations": 3}):
        texts = [lm.generate(prompt, max_new_tokens=20, **strategy)[0].token_ids for lm in (one, other)]
        assert texts[0] == texts[1]
    if kernels == "native" and blocks is not None:
        bits = {"int4": 4.5, "q4_0": 4.5, "q8_0": 8.5, "int8": 8.6}[blocks]
        per_layer = sum(
            weight.numel() for name, weight in load_file(floats / "model.safetensors").items() if ".1." in name
        )
        assert one.decoder.weight_bytes(0, 1, head=False) <= per_layer * bits / 8


def test_groups_of_inputs_that_are_not_neighbours(plain: Path, tmp_path: Path) -> None:
    quantized, floats = write(plain, tmp_path)
    path, stored = quantized / "model.safetensors", load_file(quantized / "model.safetensors")
    module, order = NAME.removesuffix(".weight"), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    stored[f"{module}.g_idx"] = stored[f"{module}.g_idx"][order].contiguous()
    save_file(stored, path)
    with pytest.raises(WeightsError, match=r"aren't neighbours, and config.json doesn't say so \(desc_act"):
        open_checkpoint(str(quantized)).weights.get(NAME)
    given = describe("gptq", 4, 32, symmetric=True)
    set_quantization(quantized, {**given, "desc_act": True})
    source = open_checkpoint(str(quantized)).weights
    numbers = (
        load_file(floats / "model.safetensors")[NAME]
        / stored[f"{module}.scales"].t().float()[:, torch.arange(64) // 32]
    )
    meant = numbers.round() * stored[f"{module}.scales"].t().float()[:, order // 32]
    assert torch.equal(source.get(NAME), meant)
    assert source.block_format(NAME) is None
    assert torch.equal(source.get(NAME, Part.columns(7, 30)), meant[:, 7:30])


def test_zero_points_that_the_configuration_denies(plain: Path, tmp_path: Path) -> None:
    quantized, _ = write(plain, tmp_path, symmetric=False)
    set_quantization(quantized, describe("gptq", 4, 32, symmetric=True))
    with pytest.raises(WeightsError, match=r"zero points other than 8, and config.json says that it has none"):
        load(str(quantized), device="cpu")


def test_missing_scales_are_named(plain: Path, tmp_path: Path) -> None:
    quantized, _ = write(plain, tmp_path)
    stored = load_file(quantized / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.scales"]
    save_file(stored, quantized / "model.safetensors")
    with pytest.raises(WeightsError, match=r"has no 'model.layers.0.mlp.up_proj.scales' beside it"):
        load(str(quantized), device="cpu")


def test_transformers_gets_the_numbers_for_training(plain: Path, tmp_path: Path) -> None:
    quantized, floats = write(plain, tmp_path)
    model = load_transformers_model(Checkpoint.in_folder(quantized), torch.float32)
    assert torch.equal(model.state_dict()[NAME], load_file(floats / "model.safetensors")[NAME])


def test_the_layout_is_named_among_the_files(plain: Path, tmp_path: Path) -> None:
    quantized, _ = write(plain, tmp_path)
    assert open_checkpoint(str(quantized)).contents.format == "safetensors (gptq, 4 bits)"


def test_weights_of_a_method_that_is_not_read(plain: Path, tmp_path: Path) -> None:
    quantized, _ = write(plain, tmp_path)
    set_quantization(quantized, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match=r"quantized.*bitsandbytes"):
        load(str(quantized), device="cpu")
