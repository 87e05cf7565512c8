"""A whole greedy round as one function of tensors: what a CUDA graph can hold and `torch.compile` can see through.

No shape, slice or branch depends on what the host learns during a round: positions, masks and rotary factors are
computed on the device from the rows' lengths, and attention reads a fixed number of slots.

Shapes: B rows, Q query tokens a row, K drafts a row, D width, V vocabulary, L layers, S slots that attention reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip.model.cache import KVCache, Slots
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.finite import best_tokens
from layerskip.model.positions import AttentionSpan, ValueSource, causal_mask
from layerskip.model.rope import RopeTable
from layerskip.model.torch.network import TorchNetwork

LEAST_SLOTS = 64


def slots_for(live: int, capacity: int) -> int:
    """Slots that attention reads where rows of up to `live` tokens matter: few sizes, so that few graphs are made.

    Args:
        live: Tokens of the longest row, the round's own included.
        capacity: T of the cache.

    Returns:
        S, a power of two from 64 on, or all T + 1 where that is less.
    """
    return min(max(LEAST_SLOTS, 1 << (live - 1).bit_length()), capacity + 1)


@dataclass(frozen=True, kw_only=True)
class RoundShape:
    """All that a round's function is made for."""

    exit_layer: int
    """E, layers that draft; 0 where nothing is drafted."""
    num_drafts: int
    """K."""
    stop: int
    """Layers in all."""
    num_rows: int
    """B, rows without a text included."""
    num_slots: int
    """S."""


@dataclass(frozen=True, kw_only=True)
class AdaptedExit:
    """An exit adapter, as a round needs it."""

    layer: int
    """The layer that adapts the state at the exit."""
    unembed: Callable[[Tensor], Tensor]
    """[B, Q, D], that layer's output -> [B, Q, V]."""


@dataclass(frozen=True, kw_only=True)
class RoundParts:
    """What of a decoder a round needs."""

    config: ModelConfig
    network: TorchNetwork
    embed: Callable[[Tensor], Tensor]
    """[B, Q] token ids -> [B, Q, D]."""
    unembed: Callable[[Tensor], Tensor]
    """[B, Q, D] -> [B, Q, V]."""
    adapters: dict[int, AdaptedExit] = field(default_factory=dict)
    """By exit; filled in while the model is put together."""
    ropes: Mapping[str, RopeTable]
    dtype: torch.dtype
    cache_dtype: torch.dtype | None = None
    """Dtype that keys and values are kept in; None: `dtype`."""


class DevicePositions:
    """`attention.Positions` for rows whose lengths only the device knows (`attention.Placement`)."""

    def __init__(
        self, parts: RoundParts, first: Tensor, num_queries: int, num_slots: int, capacity: int, committed: Tensor
    ) -> None:
        """Lay out slots, masks and rotary factors.

        Args:
            parts: The model.
            first: [B], first position of each row; positions past the capacity go to the scratch slot.
            num_queries: Q.
            num_slots: S. Must reach past every position that counts.
            capacity: T of the cache.
            committed: [B], committed tokens of each row.
        """
        rows = torch.arange(first.shape[0], device=first.device).unsqueeze(1)
        offsets = torch.arange(num_queries, device=first.device)
        positions = (first.unsqueeze(1) + offsets).clamp(max=capacity)
        self.slots: Slots = (rows, positions)
        self._positions, self._committed = positions, committed.unsqueeze(1)
        self._spans = {kind: _span(parts, kind, positions, num_slots) for kind in parts.ropes}

    def span(self, kind: str) -> AttentionSpan:
        """What one kind of layer (full or sliding) attends to, and its rotary factors."""
        return self._spans[kind]

    def sources(self, cache: KVCache, source: ValueSource) -> tuple[Tensor, Tensor]:
        """As `Positions.sources`, for the only source that a round needs: the last committed token."""
        assert source is ValueSource.COMMITTED
        return self._positions, torch.minimum(self._positions, self._committed) - 1


def _span(parts: RoundParts, kind: str, positions: Tensor, num_slots: int) -> AttentionSpan:
    """All S slots, those hidden that a query at its position doesn't see."""
    config, rope = parts.config, parts.ropes[kind]
    window = config.sliding_window if kind == SLIDING else None
    groups = config.num_attention_heads // config.num_key_value_heads
    # A query in the scratch slot sees what the last slot does: seeing nothing would make NaN of it.
    mask = causal_mask(positions.clamp(max=num_slots - 1), 0, num_slots, window, parts.dtype).repeat(1, 1, groups, 1)
    table = positions.clamp(max=rope.cos.shape[0] - 1)  # the scratch slot has no rotary factors of its own
    cos, sin = rope.cos[table].unsqueeze(2), rope.sin[table].unsqueeze(2)
    return AttentionSpan(first_slot=0, last_slot=num_slots, mask=mask, cos=cos, sin=sin)


class StaticRound:
    """Drafts and verification of one shape, over one pair of cache buffers."""

    def __init__(self, parts: RoundParts, shape: RoundShape, cache: KVCache) -> None:
        """Fix what doesn't change.

        Args:
            parts: The model.
            shape: Sizes of the round.
            cache: Its buffers are used; the cache itself isn't kept.
        """
        self.shape = shape
        self._parts = parts
        self._buffers = KVCache.over(cache.buffers, shape.num_rows, parts.dtype)
        self.capacity = self._buffers.capacity
        """Position of the scratch slot."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the round; the same inputs give the same outputs, however often.

        Args:
            inputs: [B, 2], long: each row's pending token, and its position.

        Returns:
            [B, 2K + 1], long: the drafts, then the targets after the pending token and after each draft.
        """
        parts, shape = self._parts, self.shape
        token, first = inputs[:, :1], inputs[:, 1]
        self._committed = first  # the pending token comes right after what is committed
        drafts: list[Tensor] = []
        states = [] if shape.exit_layer else [parts.embed(token)]
        if shape.exit_layer:
            for i in range(shape.num_drafts + 1):
                states.append(self._run(parts.embed(token), first + i, 0, shape.exit_layer))
                if i < shape.num_drafts:
                    token = self._draft(states[-1], first + i)
                    drafts.append(token)
            if shape.exit_layer in parts.adapters:
                self._write_keys(states[-1], first + shape.num_drafts)
        hidden = self._run(torch.cat(states, 1), first, shape.exit_layer, shape.stop)
        return torch.cat((*drafts, best_tokens(parts.unembed(hidden))), 1)

    def _draft(self, state: Tensor, first: Tensor) -> Tensor:
        """The draft that the state at the exit [B, 1, D] gives, for a token at `first` [B]."""
        adapter = self._parts.adapters.get(self.shape.exit_layer)
        if adapter is None:
            return best_tokens(self._parts.unembed(state))
        positions = self._place(first, 1)
        network, source = self._parts.network, ValueSource.COMMITTED
        return best_tokens(adapter.unembed(network.run_adapter(adapter.layer, state, positions, self._buffers, source)))

    def _run(self, hidden: Tensor, first: Tensor, start: int, stop: int) -> Tensor:
        """Layers start..stop-1 over a block whose rows begin at `first` [B]."""
        positions = self._place(first, hidden.shape[1])
        return self._parts.network.run_layers(hidden, positions, self._buffers, start, stop)

    def _write_keys(self, state: Tensor, first: Tensor) -> None:
        """The adapter's keys for a token of which nothing is drafted."""
        layer = self._parts.adapters[self.shape.exit_layer].layer
        self._parts.network.write_keys(layer, state, self._place(first, state.shape[1]), self._buffers)

    def _place(self, first: Tensor, num_queries: int) -> DevicePositions:
        capacity, slots = self._buffers.capacity, self.shape.num_slots
        return DevicePositions(self._parts, first, num_queries, slots, capacity, self._committed)
