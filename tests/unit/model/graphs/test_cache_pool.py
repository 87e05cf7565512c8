"""Buffers that outlive their caches."""

import gc

import pytest
import torch

from layerskip.errors import InvalidArgumentError
from layerskip.model.cache import KVCache
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.graphs.cache_pool import GRAIN, CachePool


@pytest.fixture
def dropped() -> list[int]:
    return []


@pytest.fixture
def pool(decoder: GraphDecoder, dropped: list[int]) -> CachePool:
    def allocate(num_rows: int, capacity: int) -> KVCache:
        return KVCache(
            decoder.config, num_rows=num_rows, capacity=capacity, dtype=torch.float32, device=torch.device("cpu")
        )

    return CachePool(allocate, 1000, dropped.append)


def test_buffers_come_back_empty(pool: CachePool, dropped: list[int]) -> None:
    cache = pool.take(2, 300)
    address = cache.keys.data_ptr()
    assert cache.keys.shape[2] == 2 * GRAIN
    cache.keys.fill_(torch.nan)
    cache.commit(0, 5)
    del cache
    gc.collect()
    again = pool.take(1, 511)
    assert again.keys.data_ptr() == address
    assert (again.lengths, again.capacity) == ([0], 511)
    assert not again.keys.any()
    assert dropped == []


def test_buffers_in_use_are_left_alone(pool: CachePool) -> None:
    first, second = pool.take(1, 10), pool.take(1, 10)
    assert first.keys.data_ptr() != second.keys.data_ptr()


def test_buffers_that_are_too_small_are_given_up(pool: CachePool, dropped: list[int]) -> None:
    cache = pool.take(1, 10)
    address = cache.keys.data_ptr()
    del cache
    gc.collect()
    pool.take(1, GRAIN)
    assert dropped == [address]


def test_no_more_slots_than_the_context_needs(pool: CachePool) -> None:
    assert [pool.take(1, capacity).capacity for capacity in (10, 255, 256, 900, 1000)] == [
        255,
        255,
        511,
        1000,
        1000,
    ]


@pytest.mark.parametrize("size", [(0, 5), (1, 0), (-1, 5)])
def test_bad_sizes(pool: CachePool, size: tuple[int, int]) -> None:
    del_me = pool.take(1, 10)
    del del_me
    gc.collect()
    with pytest.raises(InvalidArgumentError, match="at least 1 row and 1 token"):
        pool.take(*size)
