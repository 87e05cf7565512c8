"""Cache buffers that outlive their texts: a captured graph knows them by address, and serves the next text as well."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from layerskip.model.cache import KVCache

GRAIN = 256
"""Slots are a multiple of this, so that texts of similar lengths share buffers and attention reads whole blocks."""


class CachePool:
    """Lends buffers to caches; they come back when the cache is collected."""

    def __init__(
        self, allocate: Callable[[int, int], KVCache], max_context: int, on_drop: Callable[[int], None]
    ) -> None:
        """Begin without buffers.

        Args:
            allocate: A new cache of so many rows and tokens.
            max_context: Most tokens that a row ever holds.
            on_drop: Told the address of buffers that are given up.
        """
        self._allocate, self._max_context, self._on_drop = allocate, max_context, on_drop
        self._idle: list[tuple[Tensor, ...]] = []
        self._dtype: torch.dtype | None = None

    def take(self, num_rows: int, capacity: int) -> KVCache:
        """An empty cache of `num_rows` rows of at least `capacity` tokens.

        Raises:
            OutOfMemoryError: It doesn't fit.
            InvalidArgumentError: No rows or no capacity.
        """
        found = self._fitting(num_rows, capacity)
        if found is None:
            self._drop_idle()  # first, so that their memory counts as free
            rounded = -(-(capacity + 1) // GRAIN) * GRAIN - 1 if capacity > 0 else capacity
            with torch.inference_mode(False):  # or they couldn't be written outside of it
                cache = self._allocate(num_rows, max(capacity, min(rounded, self._max_context)))
            found, self._dtype = cache.buffers, cache.dtype
        else:
            with torch.inference_mode():
                for buffer in found:  # what a broken text left there may be NaN, and 0 times NaN is NaN
                    buffer.zero_()
        assert self._dtype is not None
        cache = KVCache.over(found, num_rows, self._dtype)
        weakref.finalize(cache, self._idle.append, found).atexit = False
        return cache

    def _fitting(self, num_rows: int, capacity: int) -> tuple[Tensor, ...] | None:
        """The smallest idle buffers that are large enough, taken out of the idle ones."""
        sizes = [(keys.numel(), i) for i, (keys, *_) in enumerate(self._idle) if _fits(keys, num_rows, capacity)]
        return self._idle.pop(min(sizes)[1]) if sizes and min(num_rows, capacity) > 0 else None

    def _drop_idle(self) -> None:
        while self._idle:
            self._on_drop(self._idle.pop()[0].data_ptr())


def _fits(keys: Tensor, num_rows: int, capacity: int) -> bool:
    return keys.shape[1] >= num_rows and keys.shape[2] > capacity
