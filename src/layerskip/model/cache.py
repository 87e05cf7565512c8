"""Static K/V cache with ragged rows: lengths move, tensors never do.

Shapes: L layers, exit adapters included, B rows, T capacity in tokens, H_kv key/value heads, D_head channels of a
head.
The layout is [L, B, T + 1, H_kv, D_head]: a token's heads lie together, so that writing a block of tokens is one copy.
The extra last slot is scratch: a row that has no room left writes there, and no query that counts ever reads it.

Numbers are kept in a floating dtype, or as whole numbers of 8 bits with a float32 scale for each token, layer and head.
They are rounded when they are written: the queries of a block read its own tokens' keys and values as all others do.
"""

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.config.model_config import ModelConfig

Slots = tuple[slice | Tensor | EllipsisType, ...]
"""An index into [B, T + 1, ...]."""
MOST = 127
"""Largest of the whole numbers of 8 bits."""
TINY = 1e-30
"""A head whose numbers are all below this is kept as zeros."""


class KVCache:
    """Keys and values of every layer for B rows of up to T tokens.

    The first `lengths[row]` slots of a row are committed. Layers write beyond that at explicit positions; `commit`
    moves the length forward over accepted tokens and `rollback` moves it back, both O(1).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: torch.dtype | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            config: The model it serves.
            num_rows: B.
            capacity: T, tokens a row can hold.
            dtype: Dtype of keys and values as they are written and read.
            device: Where they live.
            kept: Dtype that they are kept in, int8 or a floating one; the same if not given.

        Raises:
            InvalidArgumentError: No rows or no capacity.
            OutOfMemoryError: Not enough free memory.
        """
        if num_rows < 1 or capacity < 1:
            raise InvalidArgumentError(f"a cache needs at least 1 row and 1 token, got {num_rows} and {capacity}")
        kept = kept or dtype
        shape = _shape(config, num_rows, capacity)
        needed = cache_bytes(config, num_rows, capacity, kept)
        free = free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free))
        try:
            # Zeros, not garbage: a masked slot has weight 0, and 0 times NaN would still be NaN.
            buffers = [torch.zeros(shape, dtype=kept, device=device) for _ in range(2)]
            if kept == torch.int8:
                buffers += [torch.zeros(shape[:-1], device=device) for _ in range(2)]
        except RuntimeError as error:  # torch reports an allocation that failed so, on CPU and CUDA alike
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free)) from error
        self._set(buffers, dtype, [0] * num_rows, 0, num_rows)

    @classmethod
    def over(cls, buffers: Sequence[Tensor], num_rows: int, dtype: torch.dtype) -> "KVCache":
        """An empty cache of the first `num_rows` rows of another one's `buffers`; `dtype` as for a new one."""
        cache = cls.__new__(cls)
        cache._set(buffers, dtype, [0] * num_rows, 0, num_rows)
        return cache

    def _set(
        self, buffers: Sequence[Tensor], dtype: torch.dtype, lengths: list[int], first: int, num_rows: int
    ) -> None:
        self.buffers = tuple(buffers)
        """Keys, values, and where these are whole numbers the scales [L, B, T + 1, H_kv] of both."""
        self.keys, self.values = self.buffers[:2]
        self.dtype = dtype
        self.capacity = self.keys.shape[2] - 1
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
        buffers = self.buffers if start == 0 else [buffer[:, start:] for buffer in self.buffers]
        view._set(buffers, self.dtype, self._lengths, self._first + start, stop - start)
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
        heads, parts = keys.shape[2], (keys, values)
        if self.scaled:
            rounded = [round_to_bytes(part) for part in parts]
            for buffer, (_, scales) in zip(self.buffers[2:], rounded, strict=True):
                buffer[layer][..., :heads][slots] = scales
            parts = (rounded[0][0], rounded[1][0])
        for buffer, part in zip(self.buffers, parts, strict=False):
            buffer[layer][..., :heads, :][slots] = part.to(buffer.dtype)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values in slots start..stop-1 of every row: each [B, T, H_kv, D_head].

        They are not copied, unless they are kept in another dtype.
        """
        slots: Slots = (slice(0, self.num_rows), slice(start, stop))
        return self._read(0, layer, slots), self._read(1, layer, slots)

    def read_values(self, layer: int, slots: Slots) -> Tensor:
        """A layer's values at an index into [B, T + 1]: [..., H_kv, D_head]."""
        return self._read(1, layer, slots)

    @property
    def scaled(self) -> bool:
        """Whether keys and values are whole numbers with scales."""
        return len(self.buffers) > 2

    def _read(self, which: int, layer: int, slots: Slots) -> Tensor:
        numbers = self.buffers[which][layer][slots].to(self.dtype)
        return numbers * self.buffers[which + 2][layer][slots].unsqueeze(-1).to(self.dtype) if self.scaled else numbers

    def copy_row(self, source: int, to: int, length: int) -> None:
        """Give a row the first `length` tokens of another row, in place of its own."""
        if source != to:
            for buffer in self.buffers:
                buffer[:, to, :length] = buffer[:, source, :length]
        self._lengths[self._first + to] = length

    def swap_rows(self, row: int, other: int) -> None:
        """Exchange the committed tokens of two rows."""
        longest = max(self.lengths[row], self.lengths[other])
        for buffer in self.buffers:
            kept = buffer[:, row, :longest].clone()
            buffer[:, row, :longest] = buffer[:, other, :longest]
            buffer[:, other, :longest] = kept
        lengths, first = self._lengths, self._first
        lengths[first + row], lengths[first + other] = lengths[first + other], lengths[first + row]

    def take(self, other: "KVCache") -> None:
        """Copy the committed tokens of a cache with no more rows and no more capacity."""
        assert self.num_rows >= other.num_rows and self.capacity >= other.capacity
        for row, length in enumerate(other.lengths):
            for buffer, others in zip(self.buffers, other.buffers, strict=True):
                buffer[:, row, :length] = others[:, row, :length]
            self._lengths[self._first + row] = length


def round_to_bytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D_head] -> whole numbers from -127 to 127, and their scales [...] in float32.

    A scale is NaN or infinite where a number was, so that what is read again isn't finite either.
    """
    numbers = numbers.float()
    most = numbers.abs().amax(-1)
    kept = most >= TINY
    factors = torch.where(kept, MOST / most, 0.0).unsqueeze(-1)
    whole = (numbers * factors).round().nan_to_num(0.0).clamp(-MOST, MOST).to(torch.int8)
    return whole, torch.where(most < TINY, 0.0, most / MOST)


def token_bytes(config: ModelConfig, kept: torch.dtype) -> int:
    """Bytes of keys and values of a token, in all layers; `kept` as for a cache."""
    scale = torch.float32.itemsize if kept == torch.int8 else 0
    return 2 * config.num_cached_layers * config.num_key_value_heads * (config.head_dim * kept.itemsize + scale)


def cache_bytes(config: ModelConfig, num_rows: int, capacity: int, kept: torch.dtype) -> int:
    """Bytes of a cache's keys and values; `kept` as for a cache."""
    return num_rows * (capacity + 1) * token_bytes(config, kept)


def _shape(config: ModelConfig, num_rows: int, capacity: int) -> tuple[int, ...]:
    return config.num_cached_layers, num_rows, capacity + 1, config.num_key_value_heads, config.head_dim


def _memory_message(num_rows: int, capacity: int, needed: int, free: int | None) -> str:
    available = "" if free is None else f", and {free / 2**30:.2f} GiB are free"
    return (
        f"a cache of {num_rows} x {capacity} tokens needs {needed / 2**30:.2f} GiB{available}; "
        "use fewer prompts at a time, a shorter prompt or a smaller max_new_tokens, a 16-bit dtype, or cache_dtype "
        "bfloat16 or int8"
    )
