"""A whole round as one function of tensors: what a CUDA graph can hold and `torch.compile` can see through.

No shape, slice or branch depends on what the host learns during a round: positions, masks, rotary factors and noise are
computed on the device from what it is told of the rows (`rows.py`), and attention reads a fixed number of slots.

Shapes: B rows, Q query tokens a row, K drafts a row, D width, V vocabulary, L layers, S slots that attention reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerskip.model.cache import KVCache, Slots
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.graphs.choosing import choose, filtered, noise_after
from layerskip.model.graphs.rows import Draws, RowTensors
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
    """All that a function is made for."""

    kind: Literal["round", "pass", "draft", "last"] = "round"
    """A whole round (`StaticRound`); layers over given tokens or states (`StaticPass`); a draft, or the pass over the
    last one that completes its state (`drafting.StaticDraft`)."""
    exit_layer: int
    """E, layers that draft; 0 where nothing is drafted. Of a pass, the layers that have run already."""
    num_drafts: int
    """K. Of a pass, its tokens less one; of a draft, the most that a row may have."""
    stop: int
    """Layers in all."""
    num_rows: int
    """B, rows without a text included."""
    num_slots: int
    """S."""
    draws: Draws = "no"
    """How tokens are chosen."""
    asks: bool = False
    """Of a draft, whether its confidence is computed, and whether its row drafts on."""


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
    """`Positions` for rows whose lengths only the device knows (`positions.Placement`)."""

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
        """As `Positions.sources`."""
        match source:
            case ValueSource.COMMITTED:
                return self._positions, torch.minimum(self._positions, self._committed) - 1
            case ValueSource.BEFORE:
                return self._positions, self._positions - 1
            case _:
                return self._positions, torch.full_like(self._positions, -1)


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


class StaticPart(ABC):
    """What functions over one pair of cache buffers have in common."""

    def __init__(self, parts: RoundParts, shape: RoundShape, cache: KVCache) -> None:
        """Fix what doesn't change.

        Args:
            parts: The model.
            shape: Sizes.
            cache: Its buffers are used; the cache itself isn't kept.
        """
        self.shape = shape
        self._parts = parts
        self._buffers = KVCache.over(cache.buffers, shape.num_rows, parts.dtype)
        self.capacity = self._buffers.capacity
        """Position of the scratch slot."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the function; nothing in it waits for the host, or for the device.

        Args:
            inputs: [B, C], long: what `rows.RowInputs` holds.
        """

    def _run(self, hidden: Tensor, first: Tensor, start: int, stop: int, committed: Tensor) -> Tensor:
        """Layers start..stop-1 over a block whose rows begin at `first` [B]."""
        positions = self._place(first, hidden.shape[1], committed)
        return self._parts.network.run_layers(hidden, positions, self._buffers, start, stop)

    def _read(self, state: Tensor, first: Tensor, exit_layer: int, committed: Tensor, source: ValueSource) -> Tensor:
        """Logits [B, Q, V] of states [B, Q, D] at an exit, through its adapter if it has one."""
        adapter = self._parts.adapters.get(exit_layer)
        if adapter is None:
            return self._parts.unembed(state)
        positions = self._place(first, state.shape[1], committed)
        return adapter.unembed(self._parts.network.run_adapter(adapter.layer, state, positions, self._buffers, source))

    def _write_keys(self, state: Tensor, first: Tensor, committed: Tensor) -> None:
        """The adapter's keys for tokens of which nothing is drafted."""
        adapter = self._parts.adapters.get(self.shape.exit_layer)
        if adapter is not None:
            positions = self._place(first, state.shape[1], committed)
            self._parts.network.write_keys(adapter.layer, state, positions, self._buffers)

    def _noise(self, rows: RowTensors, offset: Tensor | int, num_queries: int) -> Tensor | None:
        """Noise of the tokens that follow Q tokens from `first + offset` on, if any row draws."""
        size = self._parts.config.vocab_size
        return None if self.shape.draws == "no" else noise_after(rows, offset, num_queries, size)

    def _targets(self, hidden: Tensor, rows: RowTensors, noise: Tensor | None) -> Tensor:
        """[B, Q], what the last layer's outputs say follows each token of a block from `first` on."""
        logits = self._read(hidden, rows.first, self.shape.stop, rows.first, ValueSource.NONE)
        return choose(filtered(logits, rows, self.shape.draws), rows, noise)

    def _place(self, first: Tensor, num_queries: int, committed: Tensor) -> DevicePositions:
        capacity, slots = self._buffers.capacity, self.shape.num_slots
        return DevicePositions(self._parts, first, num_queries, slots, capacity, committed)


class StaticRound(StaticPart):
    """Drafts and verification of one shape."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the round; the same inputs give the same outputs, however often.

        Returns:
            [B, 2K + 1], long: the drafts, then the targets after the pending token and after each draft.
        """
        parts, shape, rows = self._parts, self.shape, RowTensors.of(inputs)
        token, first = rows.token, rows.first
        noise = self._noise(rows, 0, shape.num_drafts + 1)  # drafts and targets share it
        drafts: list[Tensor] = []
        states = [] if shape.exit_layer else [parts.embed(token)]
        if shape.exit_layer:
            for i in range(shape.num_drafts + 1):
                states.append(self._run(parts.embed(token), first + i, 0, shape.exit_layer, first))
                if i < shape.num_drafts:
                    logits = self._read(states[-1], first + i, shape.exit_layer, first, ValueSource.COMMITTED)
                    scores = filtered(logits, rows, shape.draws)
                    token = choose(scores, rows, None if noise is None else noise[:, i : i + 1])
                    drafts.append(token)
            self._write_keys(states[-1], first + shape.num_drafts, first)
        hidden = self._run(torch.cat(states, 1), first, shape.exit_layer, shape.stop, first)
        return torch.cat((*drafts, self._targets(hidden, rows, noise)), 1)


class StaticPass(StaticPart):
    """Layers over given tokens, or over the states of drafts, and the choice after each."""

    def __init__(self, parts: RoundParts, shape: RoundShape, cache: KVCache) -> None:
        """As `StaticPart`; a pass that begins with the first layer takes tokens, and any other one states."""
        super().__init__(parts, shape, cache)
        size = (shape.num_rows, shape.num_drafts + 1)
        device = cache.keys.device
        with torch.inference_mode(False):
            if shape.exit_layer:
                self.block = torch.zeros(*size, parts.config.hidden_size, dtype=parts.dtype, device=device)
            else:
                self.block = torch.zeros(size, dtype=torch.long, device=device)
        """[B, K + 1], tokens, or [B, K + 1, D], the states after E layers; written before each call."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """[B, K + 1], the token after each."""
        shape, rows = self.shape, RowTensors.of(inputs)
        hidden = self.block if shape.exit_layer else self._parts.embed(self.block)
        hidden = self._run(hidden, rows.first, shape.exit_layer, shape.stop, rows.first)
        return self._targets(hidden, rows, self._noise(rows, 0, shape.num_drafts + 1))
