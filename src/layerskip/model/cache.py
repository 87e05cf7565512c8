"""Static K/V cache with ragged rows: lengths move, tensors never do.

Shapes: L layers, exit adapters included, B rows, T capacity in tokens, H_kv key/value heads, D_head channels of a
head.
The layout is [L, B, T + 1, H_kv, D_head]: a token's heads lie together, so that writing a block of tokens is one copy.
The extra last slot is scratch: a row that has no room left writes there, and no query that counts ever reads it.
"""

from types import EllipsisType

import torch
from torch import Tensor

from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.config.model_config import ModelConfig

Slots = tuple[slice | Tensor | EllipsisType, ...]
"""An index into [B, T + 1, ...]."""


class KVCache:
    """Keys and values of every layer for B rows of up to T tokens.

    The first `lengths[row]` slots of a row are committed. Layers write beyond that at explicit positions; `commit`
    moves the length forward over accepted tokens and `rollback` moves it back, both O(1).
    """

    def __init__(
        self, config: ModelConfig, *, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the cache.

        Args:
            config: The model it serves.
            num_rows: B.
            capacity: T, tokens a row can hold.
            dtype: Dtype of keys and values.
            device: Where they live.

        Raises:
            InvalidArgumentError: No rows or no capacity.
            OutOfMemoryError: Not enough free memory.
        """
        if num_rows < 1 or capacity < 1:
            raise InvalidArgumentError(f"a cache needs at least 1 row and 1 token, got {num_rows} and {capacity}")
        shape = _shape(config, num_rows, capacity)
        needed = cache_bytes(config, num_rows, capacity, dtype)
        free = free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free))
        try:
            # Zeros, not garbage: a masked slot has weight 0, and 0 times NaN would still be NaN.
            keys = torch.zeros(shape, dtype=dtype, device=device)
            values = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch reports an allocation that failed so, on CPU and CUDA alike
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free)) from error
        self._set(keys, values, [0] * num_rows, 0, num_rows)

    @classmethod
    def over(cls, keys: Tensor, values: Tensor, num_rows: int) -> "KVCache":
        """An empty cache of the first `num_rows` rows of buffers [L, B, T + 1, H_kv, D_head] that exist already."""
        cache = cls.__new__(cls)
        cache._set(keys, values, [0] * num_rows, 0, num_rows)
        return cache

    def _set(self, keys: Tensor, values: Tensor, lengths: list[int], first: int, num_rows: int) -> None:
        self.keys, self.values = keys, values
        self.capacity = keys.shape[2] - 1
        """T."""
        self.num_rows = num_rows
        """B."""
        self._lengths, self._first = lengths, first
        self._parent: KVCache | None = None

    def view(self, start: int, stop: int) -> "KVCache":
        """Rows start..stop-1 as a cache of their own: buffers and lengths are shared.

        The buffers of a view reach to the end of the whole cache, so that a compiled round for more rows than the view
        has can run over it.
        """
        assert 0 <= start <= stop <= self.num_rows, (start, stop, self.num_rows)
        view = KVCache.__new__(KVCache)
        keys, values = (self.keys, self.values) if start == 0 else (self.keys[:, start:], self.values[:, start:])
        view._set(keys, values, self._lengths, self._first + start, stop - start)
        view._parent = self  # whose buffers may go to another cache as soon as it is collected
        return view

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each row."""
        return self._lengths[self._first : self._first + self.num_rows]

    def commit(self, row: int, num_tokens: int) -> None:
        """Count the next `num_tokens` written slots of a row as committed."""
        length = self._lengths[self._first + row] + num_tokens
        assert num_tokens >= 0 and length <= self.capacity, (row, num_tokens, length, self.capacity)
        self._lengths[self._first + row] = length

    def rollback(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        assert 0 <= length <= self._lengths[self._first + row], (row, length, self.lengths[row])
        self._lengths[self._first + row] = length

    def write(self, layer: int, slots: Slots, keys: Tensor, values: Tensor) -> None:
        """Store a layer's keys and values of a block.

        Args:
            layer: Its number.
            slots: Index into [B, T + 1].
            keys: [B, Q, H_kv, D_head], or fewer heads: the others stay as they are.
            values: As the keys.
        """
        heads = keys.shape[2]
        self.keys[layer][..., :heads, :][slots] = keys
        self.values[layer][..., :heads, :][slots] = values

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values in slots start..stop-1 of every row: each [B, T, H_kv, D_head], not copied."""
        return self.keys[layer, : self.num_rows, start:stop], self.values[layer, : self.num_rows, start:stop]

    def copy_row(self, source: int, to: int, length: int) -> None:
        """Give a row the first `length` tokens of another row, in place of its own."""
        if source != to:
            self.keys[:, to, :length] = self.keys[:, source, :length]
            self.values[:, to, :length] = self.values[:, source, :length]
        self._lengths[self._first + to] = length

    def swap_rows(self, row: int, other: int) -> None:
        """Exchange the committed tokens of two rows."""
        longest = max(self.lengths[row], self.lengths[other])
        for buffer in (self.keys, self.values):
            kept = buffer[:, row, :longest].clone()
            buffer[:, row, :longest] = buffer[:, other, :longest]
            buffer[:, other, :longest] = kept
        lengths, first = self._lengths, self._first
        lengths[first + row], lengths[first + other] = lengths[first + other], lengths[first + row]

    def take(self, other: "KVCache") -> None:
        """Copy the committed tokens of a cache with no more rows and no more capacity."""
        assert self.num_rows >= other.num_rows and self.capacity >= other.capacity
        for row, length in enumerate(other.lengths):
            self.keys[:, row, :length] = other.keys[:, row, :length]
            self.values[:, row, :length] = other.values[:, row, :length]
            self._lengths[self._first + row] = length


def cache_bytes(config: ModelConfig, num_rows: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of a cache's keys and values."""
    return 2 * torch.Size(_shape(config, num_rows, capacity)).numel() * dtype.itemsize


def _shape(config: ModelConfig, num_rows: int, capacity: int) -> tuple[int, ...]:
    return config.num_cached_layers, num_rows, capacity + 1, config.num_key_value_heads, config.head_dim


def _memory_message(num_rows: int, capacity: int, needed: int, free: int | None) -> str:
    available = "" if free is None else f", and {free / 2**30:.2f} GiB are free"
    return (
        f"a cache of {num_rows} x {capacity} tokens needs {needed / 2**30:.2f} GiB{available}; "
        "use fewer prompts at a time, a shorter prompt or a smaller max_new_tokens, or a 16-bit dtype"
    )
