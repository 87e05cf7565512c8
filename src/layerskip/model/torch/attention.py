"""Attention of a block of query tokens over the live part of the cache.

Shapes: B rows, Q query tokens a row, T live cache slots, H query heads, H_kv key/value heads, G = H / H_kv,
D_head channels of a head.
"""

import torch.nn.functional as F
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.positions import AttentionSpan


def attend(query: Tensor, cache: KVCache, layer: int, span: AttentionSpan, scale: float, kv_heads: int) -> Tensor:
    """Attention of a block of queries over a layer's live slots.

    Heads that share keys become part of the query dimension, so keys and values are never repeated.

    Args:
        query: [B, Q, H, D_head], rotated.
        cache: Cache with this layer's keys and values, the block's own included.
        layer: Index of the layer.
        span: Slots that the block's queries attend to.
        scale: Factor on query-key products.
        kv_heads: H_kv; the cache may have room for more.

    Returns:
        [B, Q, H * D_head].
    """
    rows, num_queries, heads, channels = query.shape
    live = cache.read(layer, span.first_slot, span.last_slot)
    keys, values = (part[:, :, :kv_heads].transpose(1, 2) for part in live)
    folded = query.view(rows, num_queries, kv_heads, heads // kv_heads, channels).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, -1, channels)  # [B, H_kv, G * Q, D_head]
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=span.mask_for(heads // kv_heads), scale=scale)
    out = out.view(rows, kv_heads, heads // kv_heads, num_queries, channels).permute(0, 3, 1, 2, 4)
    return out.reshape(rows, num_queries, heads * channels)
