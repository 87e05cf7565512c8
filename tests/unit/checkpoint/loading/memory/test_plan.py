"""What a model needs of memory, and what fits."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_sources import make_source

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import MemoryPlan, loading_memory, plan_memory
from layerskip.checkpoint.loading.memory.weights import WeightBytes
from layerskip.checkpoint.loading.plan import LoadingPlan, choose_plan
from layerskip.checkpoint.loading.tensors import tensor_shapes
from layerskip.checkpoint.unread import UnreadCheckpoint

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
TORCH = LoadingPlan(device=torch.device("cpu"), dtype=torch.float32, context=16)


def plan(free: int | None = None, batch_size: int = 1, **changes: Any) -> MemoryPlan:
    config, source = make_source(**changes)
    return plan_memory(config, source, TORCH, chunk=8, batch_size=batch_size, free=free)


def write_headers(folder: Path, raw: dict[str, Any]) -> None:
    """A checkpoint of which only headers exist: its file is a hole."""
    (folder / "config.json").write_text(json.dumps(raw))
    offset, header = 0, {}
    for name, shape in tensor_shapes(Checkpoint.in_folder(folder).config).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offset)


def test_a_model_of_70_billion_weights_is_planned_at_once(tmp_path: Path) -> None:
    write_headers(tmp_path, LLAMA_70B)
    began = time.perf_counter()
    unread = UnreadCheckpoint(Checkpoint.in_folder(tmp_path))
    loading = choose_plan(unread, LoadingConfig(device="cpu", dtype="bfloat16"))
    memory = plan_memory(unread.network_config, unread.weights, loading, chunk=1024)
    assert time.perf_counter() - began < 3, "it only has to read headers"
    assert memory.weights + memory.mapped == pytest.approx(2 * 70.55e9, rel=0.01)
    assert memory.cache_per_token == 2 * 80 * 8 * 128 * 2
    one, two, four, eight = memory.ranks
    assert (one.weights, one.peak) == (memory.weights, memory.peak)
    assert eight.weights == pytest.approx(memory.weights / 8, rel=0.01)
    assert [rank.cache_per_token * rank.ranks for rank in (two, four, eight)] == [memory.cache_per_token] * 3


def test_the_peak_is_at_the_weight_that_needs_most_with_all_before_it() -> None:
    weights = [
        WeightBytes(part="head", format="int8", kept=10, passing=40),
        WeightBytes(part="layers", format="int8", kept=30, passing=5),
        WeightBytes(part="layers", format="int8", kept=20, mapped=7),
    ]
    memory = loading_memory(weights)
    assert (memory.kept, memory.mapped, memory.peak) == (60, 7, 60)
    assert loading_memory(weights[:2]).peak == 50


def test_heads_of_keys_are_shared_by_processes_where_there_are_too_few() -> None:
    memory = plan(num_attention_heads=4, num_key_value_heads=2)
    assert [rank.ranks for rank in memory.ranks] == [1, 2, 4, 8]
    one, two, four, _ = memory.ranks
    assert (two.cache_per_token, four.cache_per_token) == (one.cache_per_token / 2, one.cache_per_token / 2)
    assert one.weights > two.weights > four.weights > one.weights / 4


def test_the_largest_batch_and_the_longest_context_are_those_that_just_fit() -> None:
    whole = plan()
    for batch in (1, 3):
        needed = plan(batch_size=batch).needed
        assert plan(free=needed).largest_batch == batch
        assert plan(free=needed - 1).largest_batch == batch - 1
    assert plan(free=whole.needed).longest_context == 16
    shorter = plan(free=whole.needed - 1).longest_context
    assert shorter is not None
    assert 0 < shorter < 16
    assert plan(free=whole.weights).longest_context == 0
    assert (whole.largest_batch, whole.longest_context) == (None, None)


def test_exit_adapters_have_keys_and_values(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from adapters import write_tiny_adapters

    folder = tiny_checkpoint()
    adapters = write_tiny_adapters(tmp_path / "adapters", folder, [1, 2])
    checkpoint = Checkpoint.in_folder(folder)

    def cache_per_token(**options: Any) -> int:
        loading = choose_plan(checkpoint, LoadingConfig(device="cpu", **options))
        return plan_memory(checkpoint.network_config, checkpoint.weights, loading, chunk=8).cache_per_token

    layers = checkpoint.config.num_layers
    assert cache_per_token(exit_adapters=adapters) * layers == cache_per_token() * (layers + 2)
