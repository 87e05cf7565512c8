"""The cache: lengths move and tensors don't, rows are views, and what has no room lands in the scratch slot.

Shapes: L layers, B rows, T capacity in tokens.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model import cache as cache_module
from layerskip.model.cache import KVCache
from layerskip.model.config.families import parse_config
from layerskip.model.decoder import Decoder

CPU = torch.device("cpu")
CONFIG = parse_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
)


def make(num_rows: int = 3, capacity: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, num_rows=num_rows, capacity=capacity, dtype=dtype, device=CPU)


def test_layout() -> None:
    cache = make(dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (3, 3, 9, 2, 8)  # one slot more than the capacity
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert not cache.keys.any()
    assert not cache.values.any()
    assert (cache.num_rows, cache.capacity, cache.lengths) == (3, 8, [0, 0, 0])


def test_commit_and_rollback_move_lengths_only() -> None:
    cache = make()
    cache.keys.normal_()
    before, address = cache.keys.clone(), cache.keys.data_ptr()
    cache.commit(0, 5)
    cache.commit(2, 8)
    cache.commit(0, 0)
    cache.commit(0, 2)
    cache.rollback(2, 3)
    cache.rollback(0, 7)
    assert cache.lengths == [7, 0, 3]
    cache.commit(2, 1)
    assert cache.lengths == [7, 0, 4]
    assert torch.equal(cache.keys, before)
    assert cache.keys.data_ptr() == address


@pytest.mark.parametrize("num_tokens", [9, -1])
def test_commit_within_the_capacity(num_tokens: int) -> None:
    with pytest.raises(AssertionError):
        make().commit(0, num_tokens)


@pytest.mark.parametrize("length", [3, -1])
def test_rollback_goes_back_only(length: int) -> None:
    cache = make()
    cache.commit(0, 2)
    with pytest.raises(AssertionError):
        cache.rollback(0, length)


def filled(lengths: tuple[int, ...] = (2, 7, 5), capacity: int = 8) -> KVCache:
    """A cache with random contents, of which some are committed."""
    cache = make(len(lengths), capacity)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    cache.values.normal_(generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        cache.commit(row, length)
    return cache


def contents(cache: KVCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Committed keys and values of each row, [L, length, H_kv, D_head]."""
    return [
        (cache.keys[:, row, :length].clone(), cache.values[:, row, :length].clone())
        for row, length in enumerate(cache.lengths)
    ]


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 2), (1, 2), (1, 3), (2, 2), (0, 0)])
def test_a_view_shares_buffers_and_lengths(start: int, stop: int) -> None:
    cache = filled()
    view = cache.view(start, stop)
    assert (view.num_rows, view.capacity) == (stop - start, 8)
    assert view.lengths == [2, 7, 5][start:stop]
    for row in range(stop - start):
        view.commit(row, 1)
        cache.rollback(start + row, 2)
        assert view.lengths[row] == cache.lengths[start + row] == 2
        keys, values = view.read(1, 0, 2)
        assert torch.equal(keys[row], cache.keys[1, start + row, :2])
        assert torch.equal(values[row], cache.values[1, start + row, :2])
        assert keys.data_ptr() == cache.keys[1, start].data_ptr()


def test_what_a_view_writes_is_in_the_cache() -> None:
    cache, keys, values = make(), torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    view = cache.view(1, 3)
    view.write(2, (torch.tensor([[0], [1]]), torch.tensor([[3, 4], [0, 1]])), keys, values)
    assert torch.equal(cache.keys[2, 1, 3:5], keys[0])
    assert torch.equal(cache.values[2, 2, 0:2], values[1])
    assert not cache.keys[:, 0].any()
    assert not cache.keys[:2].any()


def test_a_view_of_a_view() -> None:
    cache = filled((1, 2, 3, 4))
    view = cache.view(1, 4).view(1, 3)
    assert view.lengths == [3, 4]
    view.rollback(0, 1)
    assert cache.lengths == [1, 2, 1, 4]
    assert torch.equal(view.read(0, 0, 4)[0][1], cache.keys[0, 3, :4])


def test_a_view_keeps_its_cache_alive() -> None:
    """Whose buffers may serve another cache once it is gone."""
    cache = filled()
    gone = weakref.ref(cache)
    view = cache.view(1, 2).view(0, 1)
    del cache
    gc.collect()
    assert gone() is not None
    assert view.lengths == [7]
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_a_view_lies_within_the_cache(start: int, stop: int) -> None:
    with pytest.raises(AssertionError):
        make().view(start, stop)


@pytest.mark.parametrize(("source", "to", "length"), [(1, 0, 7), (1, 2, 4), (0, 1, 2), (2, 0, 0), (1, 1, 3)])
def test_a_copied_row_replaces_another(source: int, to: int, length: int) -> None:
    cache = filled()
    before = contents(cache)
    cache.copy_row(source, to, length)
    expected = [2, 7, 5]
    expected[to] = length
    assert cache.lengths == expected
    for row, (keys, values) in enumerate(contents(cache)):
        from_ = before[source] if row == to else before[row]
        assert_same((keys, values), (from_[0][:, : cache.lengths[row]], from_[1][:, : cache.lengths[row]]))


@pytest.mark.parametrize(("row", "other"), [(0, 1), (1, 0), (0, 2), (1, 2), (1, 1)])
def test_swapped_rows_exchange_what_they_hold(row: int, other: int) -> None:
    cache = filled()
    before = contents(cache)
    cache.swap_rows(row, other)
    order = [0, 1, 2]
    order[row], order[other] = other, row
    assert cache.lengths == [(2, 7, 5)[place] for place in order]
    for found, place in zip(contents(cache), order, strict=True):
        assert_same(found, before[place])


def test_rows_of_a_view_move_within_it() -> None:
    cache = filled((1, 2, 3, 4))
    before = contents(cache)
    view = cache.view(1, 4)
    view.swap_rows(0, 2)
    view.copy_row(1, 0, 2)
    assert cache.lengths == [1, 2, 3, 2]
    found = contents(cache)
    for row, place in ((0, 0), (2, 2), (3, 1)):
        assert_same(found[row], before[place])
    assert_same(found[1], (before[2][0][:, :2], before[2][1][:, :2]))


def test_a_larger_cache_takes_what_a_smaller_one_holds() -> None:
    small = filled()
    large = make(5, 20)
    large.take(small)
    assert large.lengths == [2, 7, 5, 0, 0]
    for found, expected in zip(contents(large), contents(small), strict=False):
        assert_same(found, expected)
    assert not large.keys[:, 3:].any()
    with pytest.raises(AssertionError):
        small.take(large)


def test_an_empty_cache_over_buffers_that_exist() -> None:
    cache = filled()
    again = KVCache.over(cache.buffers, 2, torch.float32)
    assert (again.num_rows, again.capacity, again.lengths) == (2, 8, [0, 0])
    assert again.keys is cache.keys


@pytest.mark.parametrize(("num_rows", "capacity"), [(0, 8), (1, 0), (-1, 8), (2, -3)])
def test_rows_and_capacity_must_be_positive(num_rows: int, capacity: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"at least 1 row and 1 token, got {num_rows} and {capacity}"):
        make(num_rows, capacity)


def test_a_cache_beyond_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 3 * 2 * 101 * 2 * 8 * 4
    monkeypatch.setattr(cache_module, "free_memory", lambda device: needed - 1)
    with pytest.raises(OutOfMemoryError, match="2 x 100 tokens") as error:
        make(2, 100)
    for advice in ("GiB", "are free", "fewer prompts", "max_new_tokens"):
        assert advice in str(error.value)
    monkeypatch.setattr(cache_module, "free_memory", lambda device: needed)
    assert make(2, 100).capacity == 100


def test_a_huge_cache_is_refused_before_it_is_allocated() -> None:
    if free_memory(CPU) is None:
        pytest.skip("free memory can't be told here")
    with pytest.raises(OutOfMemoryError):
        make(1, 10**12)


@pytest.mark.parametrize("capacity", [10**12, 10**18])
def test_an_allocation_that_fails(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "free_memory", lambda device: None)
    with pytest.raises(OutOfMemoryError, match=f"1 x {capacity} tokens") as error:
        make(1, capacity)
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    return Checkpoint.in_folder(tiny_checkpoint(), "").load_decoder(LoadingConfig(device="cpu"))


@torch.inference_mode()
def write(decoder: Decoder, cache: KVCache, first: list[int], num_queries: int) -> Any:
    """Run a block of tokens; returns which slots [B, T + 1] of any layer have changed."""
    before = cache.keys.clone(), cache.values.clone()
    tokens = torch.randint(0, 96, (len(first), num_queries), generator=torch.Generator().manual_seed(3))
    positions = decoder.place(cache, first, num_queries)
    decoder.run_layers(decoder.embed(tokens), positions, cache, 0, decoder.num_layers)
    changed = [(new != old).flatten(3).any(-1) for new, old in zip((cache.keys, cache.values), before, strict=True)]
    for each in changed:
        assert all(torch.equal(layer, each[0]) for layer in each)  # every layer writes the same slots
    assert torch.equal(*changed)
    return [[slot for slot, hit in enumerate(row) if hit] for row in changed[0][0].tolist()]


@pytest.mark.parametrize(
    ("first", "num_queries", "slots"),
    [
        ([3, 3], 4, [[3, 4, 5, 6]] * 2),
        ([0, 5], 2, [[0, 1], [5, 6]]),
        ([4, 0], 4, [[4, 5, 6, 7], [0, 1, 2, 3]]),
        ([6, 1], 4, [[6, 7, 8], [1, 2, 3, 4]]),  # 8 is the scratch slot
        ([8, 2], 3, [[8], [2, 3, 4]]),
        ([6, 6], 4, [[6, 7, 8]] * 2),
        ([8, 8], 1, [[8]] * 2),
    ],
)
def test_slots_written(decoder: Decoder, first: list[int], num_queries: int, slots: list[list[int]]) -> None:
    assert write(decoder, decoder.new_cache(2, 8), first, num_queries) == slots


def test_only_the_layers_that_run_write(decoder: Decoder) -> None:
    cache = decoder.new_cache(1, 8)
    positions = decoder.place(cache, [0], 2)
    decoder.run_layers(decoder.embed(torch.tensor([[1, 2]])), positions, cache, 1, 3)
    assert cache.keys.flatten(1).any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_kept_in_fewer_bits(kept: torch.dtype) -> None:
    """What is read is near what was written, and moves and copies take all of it along."""
    cache = KVCache(CONFIG, num_rows=3, capacity=8, dtype=torch.float32, device=CPU, kept=kept)
    keys, values = torch.randn(2, 3, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        cache.write(layer, (slice(0, 3), slice(2, 6)), keys, values)
    for read, written in zip(cache.read(1, 2, 6), (keys, values), strict=True):
        assert read.dtype == torch.float32
        error = (read - written).abs().amax()
        assert error == 0 if kept == torch.float32 else 0 < error < written.abs().amax() / 100
    for row in range(3):
        cache.commit(row, 6)
    cache.swap_rows(0, 2)
    cache.copy_row(1, 0, 6)
    other = KVCache(CONFIG, num_rows=4, capacity=9, dtype=torch.float32, device=CPU, kept=kept)
    other.take(cache)
    for found, row in ((0, 1), (1, 1), (2, 0)):
        assert all(torch.equal(other.buffers[i][:, found, :6], cache.buffers[i][:, found, :6]) for i in range(2))
        torch.testing.assert_close(other.read(1, 2, 6)[0][found], keys[row], rtol=0.02, atol=0.02)
    view = cache.view(1, 3)
    assert torch.equal(view.read(0, 0, 6)[1], cache.read(0, 0, 6)[1][1:])
