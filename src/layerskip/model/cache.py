"""Static K/V cache with ragged rows: lengths move, tensors never do.

Shapes: L layers, B rows, T capacity in tokens, H_kv key/value heads, D_head channels of a head.
The layout is [L, B, T + 1, H_kv, D_head]: a token's heads lie together, so that writing a block of tokens is one copy.
The extra last slot is scratch: a row that has no room left writes there, and no query that counts ever reads it.
"""

import torch

from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.config.model_config import ModelConfig


class KVCache:
    """Keys and values of every layer for B rows of up to T tokens.

    A row's first `lengths[row]` slots are committed. Layers write beyond that at explicit positions; `commit` moves
    the length forward over what was accepted and `rollback` back, both O(1).
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
        shape = (config.num_layers, num_rows, capacity + 1, config.num_key_value_heads, config.head_dim)
        needed = 2 * torch.Size(shape).numel() * dtype.itemsize
        free = free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free))
        try:
            # Zeros, not garbage: a masked slot has weight 0, and 0 times NaN would still be NaN.
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch reports an allocation that failed so, on CPU and CUDA alike
            raise OutOfMemoryError(_memory_message(num_rows, capacity, needed, free)) from error
        self.capacity = capacity
        self.lengths = [0] * num_rows

    @classmethod
    def over(cls, keys: torch.Tensor, values: torch.Tensor, num_rows: int) -> "KVCache":
        """An empty cache of the first `num_rows` rows of buffers [L, B, T + 1, H_kv, D_head] that exist already."""
        cache = cls.__new__(cls)
        cache.keys, cache.values = keys, values
        cache.capacity = keys.shape[2] - 1
        cache.lengths = [0] * num_rows
        return cache

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.lengths)

    def commit(self, row: int, num_tokens: int) -> None:
        """Count the next `num_tokens` written slots of a row as part of its text."""
        length = self.lengths[row] + num_tokens
        assert num_tokens >= 0 and length <= self.capacity, (row, num_tokens, self.lengths[row], self.capacity)
        self.lengths[row] = length

    def rollback(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        assert 0 <= length <= self.lengths[row], (row, length, self.lengths[row])
        self.lengths[row] = length

    def take(self, other: "KVCache") -> None:
        """Copy the committed tokens of a cache with as many rows and no more capacity."""
        assert self.num_rows == other.num_rows and self.capacity >= other.capacity
        for row, length in enumerate(other.lengths):
            self.keys[:, row, :length] = other.keys[:, row, :length]
            self.values[:, row, :length] = other.values[:, row, :length]
        self.lengths = list(other.lengths)

    def remove_row(self, row: int) -> None:
        """Drop a finished row; the last row takes its place.

        This copies one row's committed tokens, once for each finished row of a batch, so that the rows still running
        stay at the front and finished ones cost nothing.
        """
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            self.keys[:, row, :length] = self.keys[:, last, :length]
            self.values[:, row, :length] = self.values[:, last, :length]
            self.lengths[row] = length
        self.lengths.pop()


def _memory_message(num_rows: int, capacity: int, needed: int, free: int | None) -> str:
    available = "" if free is None else f", and {free / 2**30:.2f} GiB are free"
    return (
        f"a cache of {num_rows} x {capacity} tokens needs {needed / 2**30:.2f} GiB{available}; "
        "use fewer prompts at a time, a shorter prompt or a smaller max_new_tokens, or a 16-bit dtype"
    )
