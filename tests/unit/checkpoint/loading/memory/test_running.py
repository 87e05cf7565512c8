"""Planned bytes of caches and of working memory."""

import re
from pathlib import Path

import pytest
import torch
from tensor_sources import make_source

from layerskip.checkpoint.loading.memory import running
from layerskip.checkpoint.loading.memory.running import cache_bytes, working_bytes
from layerskip.model.cache import KVCache

NATIVE = Path(__file__).parents[5] / "native"


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_cache_takes_what_is_planned(rows: int, tokens: int, dtype: torch.dtype) -> None:
    config, _ = make_source()
    kind = torch.float32
    cache = KVCache(config, num_rows=rows, capacity=tokens, dtype=kind, device=torch.device("cpu"), kept=dtype)
    assert cache_bytes(config, dtype, rows, tokens) == sum(buffer.nbytes for buffer in cache.buffers)


def test_sizes_of_the_compiled_code_are_those_of_its_sources() -> None:
    chunk = re.search(r"kChunk = (\d+);", (NATIVE / "pass.cpp").read_text())
    kept = re.search(r"kKept = 1 << (\d+);", (NATIVE / "kernels" / "attention.h").read_text())
    assert chunk is not None
    assert kept is not None
    assert int(chunk[1]) == running.NATIVE_BLOCK
    assert 1 << int(kept[1]) == running.NATIVE_RESULTS


def test_masks_of_torch_grow_with_the_sequence_and_native_needs_none() -> None:
    config, _ = make_source()

    def work(tokens: int, *, native: bool) -> int:
        return working_bytes(config, torch.float32, native=native, rows=1, chunk=8, tokens=tokens)

    group = config.num_attention_heads // config.num_key_value_heads
    assert work(64, native=False) - work(16, native=False) == group * 8 * 48 * 4
    assert work(64, native=True) == work(16, native=True)
