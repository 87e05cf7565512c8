"""Planned bytes of weights are those of the network that is then loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_tiny_adapters
from gguf import GGMLQuantizationType
from gguf_files import convert, tiny_sizes

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.weights import WeightBytes, weights_of
from layerskip.checkpoint.loading.plan import choose_plan
from layerskip.model.decoder import Decoder
from layerskip.model.native.library import load_library

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
native_only = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


def planned(checkpoint: Checkpoint, **options: Any) -> tuple[list[WeightBytes], Decoder]:
    config = LoadingConfig(device="cpu", **options)
    plan = choose_plan(checkpoint, config)
    return weights_of(checkpoint.network_config, checkpoint.weights, plan), checkpoint.load_decoder(config)


def kept(items: list[WeightBytes], *parts: str) -> int:
    return sum(item.kept for item in items if item.part in parts)


def products(decoder: Decoder) -> int:
    """Bytes of all layers and the head, as the loaded network counts them."""
    return decoder.weight_bytes(0, decoder.num_layers)


@native_only
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_native_weights_of_safetensors(
    tiny_checkpoint: Callable[..., Path], quantize: str | None, tied: bool, dtype: str, model_type: str
) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(model_type, dtype=dtype, tie_word_embeddings=tied, **SIZES))
    items, decoder = planned(checkpoint, quantize=quantize)
    assert kept(items, "layers", "head") == products(decoder)
    (embedding,) = (item for item in items if item.part == "embedding")
    assert (embedding.kept, embedding.mapped) == (0, 100 * 64 * (2 if dtype == "bfloat16" else 4))


@native_only
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16", "F32"])
def test_native_weights_of_gguf(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, type_: str, quantize: str | None
) -> None:
    folder = tiny_checkpoint(**SIZES | tiny_sizes(type_))
    file = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType[type_])
    items, decoder = planned(open_checkpoint(str(file)), quantize=quantize)
    assert kept(items, "layers", "head") == products(decoder)


@native_only
def test_native_weights_in_several_formats(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(**SIZES | tiny_sizes("Q4_K"))
    types = {"attn_v": GGMLQuantizationType.Q6_K, "ffn_up": GGMLQuantizationType.Q5_K}
    file = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q4_K, types=types)
    items, decoder = planned(open_checkpoint(str(file)))
    assert kept(items, "layers", "head") == products(decoder)
    assert {"q4_k", "q4_k+q6_k", "q4_k+q5_k"} == {item.format for item in items if item.part == "layers"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_torch(tiny_checkpoint: Callable[..., Path], dtype: str, tied: bool) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(tie_word_embeddings=tied, **SIZES))
    items, decoder = planned(checkpoint, kernels="torch", dtype=dtype)
    assert kept(items, "layers", "head", "embedding, head") == products(decoder)


@native_only
def test_drafts_in_fewer_bits_are_counted_besides(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(**SIZES))
    items, decoder = planned(checkpoint, quantize_draft="int8", draft_vocabulary=20)
    drafter = decoder.drafter(1).decoder
    assert kept(items, "layers", "head") == products(decoder)
    assert kept(items, "draft layers", "draft head") == drafter.weight_bytes(0, decoder.num_layers // 2)


@native_only
def test_exit_adapters_are_counted(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(**SIZES)
    adapters = write_tiny_adapters(tmp_path / "adapters", folder, [2], tokens=range(20))
    checkpoint = Checkpoint.in_folder(folder)
    items, decoder = planned(checkpoint, exit_adapters=adapters)
    own = sum(item.kept for item in items if item.part == "exit adapters" and item.format == "int8")
    assert own == decoder.drafter(2).decoder.adapter_bytes()
    assert kept(items, "layers", "head") == products(decoder)


def test_gpu_memory_has_the_embedding_table_too(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from layerskip.checkpoint.loading import plan as plan_module

    monkeypatch.setattr(plan_module, "choose_device", lambda device, local_rank: torch.device("cuda"))
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(dtype="bfloat16", tie_word_embeddings=False, **SIZES))
    plan = choose_plan(checkpoint, LoadingConfig(device="auto"))
    items = weights_of(checkpoint.network_config, checkpoint.weights, plan)
    assert kept(items, "embedding") == kept(items, "head") == 100 * 64 * 2
    assert sum(item.mapped for item in items) == 0
