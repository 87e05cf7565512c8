"""Where a block of query tokens stands in the cache, and attention over the live part of it.

Shapes: B rows, Q query tokens a row, T live cache slots, H query heads, H_kv key/value heads, G = H / H_kv,
D_head channels of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.config import SLIDING, ModelConfig
from layerskip.model.rope import RopeTable

Slots = tuple[slice | Tensor | EllipsisType, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionSpan:
    """What one kind of layer (full or sliding) attends to, and its rotary factors, for one block of queries."""

    first_slot: int
    last_slot: int
    """Slots first_slot..last_slot-1 hold everything that any query of the block may see."""
    mask: Tensor | None
    """[B or 1, 1, G * Q, T], 0 or -inf; None where every query sees the whole span."""
    cos: Tensor
    sin: Tensor
    """[B or 1, Q, 1, R]."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Q consecutive positions in each row, row b starting at `first[b]`; made once a block, used by all its layers."""

    first: tuple[int, ...]
    num_queries: int
    slots: Slots
    """Index into a layer's [B, T, H_kv, D_head] buffers where the block's keys and values go."""
    spans: Mapping[str, AttentionSpan]


def place(
    config: ModelConfig,
    ropes: Mapping[str, RopeTable],
    cache: KVCache,
    first: Sequence[int],
    num_queries: int,
    dtype: torch.dtype,
) -> Positions:
    """Lay out a block of queries: slots to write, spans to read, masks and rotary factors.

    All of it is known on the host, so no device is waited for. Rows that start at the same position (a single row
    always does) need slices only; ragged rows need index tensors.

    Args:
        config: The model.
        ropes: Rotary table of each kind of layer.
        cache: The cache that the block reads and writes.
        first: First position of each row; positions past the capacity go to the scratch slot.
        num_queries: Q.
        dtype: Dtype of the mask.
    """
    device = cache.keys.device
    start, end = min(first), max(first) + num_queries
    uniform = start == max(first) and end <= cache.capacity
    if uniform:
        table: slice | Tensor = slice(start, end)
        positions = torch.arange(start, end, device=device).unsqueeze(0)
        slots: Slots = (slice(0, len(first)), table)
    else:
        positions = torch.tensor(first, device=device).unsqueeze(1) + torch.arange(num_queries, device=device)
        positions = positions.clamp_(max=cache.capacity)
        table = positions.clamp(max=cache.capacity - 1)
        slots = (torch.arange(len(first), device=device).unsqueeze(1), positions)
    end = min(end, cache.capacity + 1)
    groups = config.num_attention_heads // config.num_key_value_heads

    def span(kind: str) -> AttentionSpan:
        window = config.sliding_window if kind == SLIDING else None
        low = 0 if window is None else max(0, start - window + 1)
        mask = None
        if num_queries > 1 or not uniform:
            mask = _mask(positions, low, end, window, dtype).repeat(1, 1, groups, 1)
        rope = ropes[kind]
        cos, sin = rope.cos[table], rope.sin[table]
        shape = (-1, num_queries, 1, cos.shape[-1])
        return AttentionSpan(first_slot=low, last_slot=end, mask=mask, cos=cos.view(shape), sin=sin.view(shape))

    return Positions(
        first=tuple(first),
        num_queries=num_queries,
        slots=slots,
        spans={kind: span(kind) for kind in dict.fromkeys(config.layer_types)},
    )


def _mask(positions: Tensor, low: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [B, 1, Q, T] over slots low..end-1, limited to `window` tokens where given."""
    keys = torch.arange(low, end, device=positions.device)
    queries = positions.unsqueeze(-1)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf).unsqueeze(1)


def attend(query: Tensor, cache: KVCache, layer: int, span: AttentionSpan, scale: float) -> Tensor:
    """Attention of a block of queries over a layer's live slots.

    Heads that share keys are folded into the query dimension, so that keys and values are never repeated.

    Args:
        query: [B, Q, H, D_head], rotated.
        cache: Holds this layer's keys and values of the block already.
        layer: Index of the layer.
        span: What the block's queries see.
        scale: Factor on query-key products.

    Returns:
        [B, Q, H * D_head].
    """
    rows, num_queries, heads, channels = query.shape
    keys = cache.keys[layer, :rows, span.first_slot : span.last_slot].transpose(1, 2)  # [B, H_kv, T, D_head]
    values = cache.values[layer, :rows, span.first_slot : span.last_slot].transpose(1, 2)
    kv_heads = keys.shape[1]
    folded = query.view(rows, num_queries, kv_heads, heads // kv_heads, channels).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, -1, channels)  # [B, H_kv, G * Q, D_head]
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=span.mask, scale=scale)
    out = out.view(rows, kv_heads, heads // kv_heads, num_queries, channels).permute(0, 3, 1, 2, 4)
    return out.reshape(rows, num_queries, heads * channels)
