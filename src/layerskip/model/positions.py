"""Positions of a block of query tokens in the cache, and the slots that each token attends to.

Shapes: B rows, Q query tokens a row, T live cache slots, H query heads, H_kv key/value heads, G = H / H_kv,
D_head channels of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from layerskip.model.cache import KVCache, Slots
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.rope import RopeTable

DISTANCES = 9
"""Classes of distances from a token to the one whose values an exit adapter reads: 0 for the token before, up to 7 and
more, and the last for no token at all."""


class ValueSource(Enum):
    """Which token's values an adapter reads."""

    COMMITTED = "the last committed token before: while drafting, all layers have run over no later one"
    BEFORE = "the token before: all layers have run over the block"
    NONE = "none: the later layers never run over the text"


@dataclass(frozen=True, kw_only=True)
class AttentionSpan:
    """Slots, mask and rotary factors of one kind of layer (full or sliding) for a block of queries."""

    first_slot: int
    last_slot: int
    """Slots first_slot..last_slot-1 contain everything that any query of the block may attend to."""
    mask: Tensor | None
    """[B or 1, 1, G * Q, T], 0 or -inf; None if every query attends to the whole span."""
    cos: Tensor
    sin: Tensor
    """[B or 1, Q, 1, R]."""

    def mask_for(self, groups: int) -> Tensor | None:
        """The mask for layers whose G differs: [B or 1, 1, G * Q, T]."""
        queries = self.cos.shape[1]
        if self.mask is None or self.mask.shape[2] == groups * queries:
            return self.mask
        return self.mask[:, :, :queries].repeat(1, 1, groups, 1)


class Placement(Protocol):
    """Interface of a block's positions for layers in torch: `Positions`, or `DevicePositions` in `graphs/static.py`."""

    @property
    def slots(self) -> Slots:
        """Index into a layer's [B, T, H_kv, D_head] buffers where the block's keys and values go."""
        ...

    def span(self, kind: str) -> AttentionSpan:
        """What one kind of layer (full or sliding) attends to, and its rotary factors."""
        ...

    def sources(self, cache: KVCache, source: ValueSource) -> tuple[Tensor, Tensor]:
        """Positions [B or 1, Q], and the slots [B, Q] of the tokens whose values an adapter reads; -1: none."""
        ...


class Positions:
    """Q consecutive positions in each row, from `first[b]` on in row b; made once for a block and used by all layers.

    Everything is known on the host, so nothing waits for the device. Rows that start at the same position (a single row
    always does) need slices only; ragged rows need index tensors. Slots, masks and rotary factors are computed when
    they are first used; native layers need only `first`.
    """

    def __init__(
        self,
        config: ModelConfig,
        ropes: Mapping[str, RopeTable],
        cache: KVCache,
        first: Sequence[int],
        num_queries: int,
        dtype: torch.dtype,
    ) -> None:
        """Set the positions.

        Args:
            config: The model.
            ropes: Rotary table of each kind of layer.
            cache: The cache that the block reads and writes.
            first: First position of each row; positions beyond the capacity use the scratch slot.
            num_queries: Q.
            dtype: Dtype of the masks.
        """
        self.first = tuple(first)
        self.num_queries = num_queries
        self._config, self._ropes, self._dtype = config, ropes, dtype
        self._capacity, self._device = cache.capacity, cache.keys.device
        self._spans: dict[str, AttentionSpan] = {}

    @cached_property
    def slots(self) -> Slots:
        """Index into a layer's [B, T, H_kv, D_head] buffers where the block's keys and values go."""
        if self._uniform:
            return (slice(0, len(self.first)), slice(self._start, self._end))
        return (torch.arange(len(self.first), device=self._device).unsqueeze(1), self._positions)

    def span(self, kind: str) -> AttentionSpan:
        """What one kind of layer (full or sliding) attends to, and its rotary factors."""
        if kind not in self._spans:
            self._spans[kind] = self._make_span(kind)
        return self._spans[kind]

    def sources(self, cache: KVCache, source: ValueSource) -> tuple[Tensor, Tensor]:
        """Positions [B or 1, Q], and the slots [B, Q] of the tokens whose values an adapter reads; -1: none."""
        return self._positions, torch.tensor(self.source_slots(cache.lengths, source), device=self._device)

    def source_slots(self, committed: Sequence[int], source: ValueSource) -> list[list[int]]:
        """For each row and token the slot of the token whose values an adapter reads; -1: none.

        Args:
            committed: Committed tokens of each row.
            source: Which token is wanted.
        """
        offsets = range(self.num_queries)
        return [
            [source_of(min(first + offset, self._capacity), length, source) for offset in offsets]
            for first, length in zip(self.first, committed, strict=True)
        ]

    @property
    def _start(self) -> int:
        return min(self.first)

    @property
    def _end(self) -> int:
        return max(self.first) + self.num_queries

    @property
    def _uniform(self) -> bool:
        return self._start == max(self.first) and self._end <= self._capacity

    @cached_property
    def _positions(self) -> Tensor:
        """[B or 1, Q]."""
        if self._uniform:
            return torch.arange(self._start, self._end, device=self._device).unsqueeze(0)
        offsets = torch.arange(self.num_queries, device=self._device)
        positions = torch.tensor(self.first, device=self._device).unsqueeze(1) + offsets
        return positions.clamp_(max=self._capacity)

    def _make_span(self, kind: str) -> AttentionSpan:
        window = self._config.sliding_window if kind == SLIDING else None
        low = 0 if window is None else max(0, self._start - window + 1)
        end = min(self._end, self._capacity + 1)
        mask = None
        if self.num_queries > 1 or not self._uniform:
            groups = self._config.num_attention_heads // self._config.num_key_value_heads
            mask = causal_mask(self._positions, low, end, window, self._dtype).repeat(1, 1, groups, 1)
        table: slice | Tensor = slice(self._start, self._end)
        if not self._uniform:
            table = self._positions.clamp(max=self._capacity - 1)
        cos, sin = self._ropes[kind].cos[table], self._ropes[kind].sin[table]
        shape = (-1, self.num_queries, 1, cos.shape[-1])
        return AttentionSpan(first_slot=low, last_slot=end, mask=mask, cos=cos.view(shape), sin=sin.view(shape))


def source_of(position: int, committed: int, source: ValueSource) -> int:
    """The slot of the token whose values a token at a position reads; -1: none.

    Args:
        position: Of the token that reads.
        committed: Tokens of its row that are committed.
        source: Which token is wanted.
    """
    match source:
        case ValueSource.COMMITTED:
            return min(position, committed) - 1
        case ValueSource.BEFORE:
            return position - 1
        case _:
            return -1


def causal_mask(positions: Tensor, low: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [B, 1, Q, T] of queries at `positions` over slots low..end-1, limited to `window` tokens."""
    keys = torch.arange(low, end, device=positions.device)
    queries = positions.unsqueeze(-1)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf).unsqueeze(1)
