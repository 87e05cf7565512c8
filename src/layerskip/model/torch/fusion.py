"""What an exit adapter reads besides the state at its exit: the values that later layers keep of an earlier token.

The state after a few layers knows little of the text before it. The later layers know more, but have not run over the
tokens that are being drafted. So an adapter reads, from the cache, the values that some later layers keep of the last
token that all layers have run over. How far back that token lies is one of `DISTANCES` classes.

Shapes: B rows, Q query tokens a row, S layers whose values are read, H_kv key/value heads, D_head channels of a head,
D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.positions import DISTANCES
from layerskip.model.torch.linear import Linear, Linear_co


@dataclass(frozen=True, kw_only=True)
class Fusion(Generic[Linear_co]):
    """Weights with which an adapter reads them."""

    layers: tuple[int, ...]
    """S layers."""
    values: Linear_co
    """S H_kv D_head -> D."""
    distances: Tensor
    """[DISTANCES, D], added to it."""


def fuse(
    fusion: Fusion[Linear],
    positions: Tensor,
    sources: Tensor,
    cache: KVCache,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What is added to the state after the adapter's attention.

    Args:
        fusion: The adapter's weights.
        positions: [B or 1, Q], where the tokens stand.
        sources: [B, Q], the slots of the tokens whose values they read; -1: none.
        cache: Holds them.
        total: Adds up the products of several processes that have some of the heads each.

    Returns:
        [B, Q, D].
    """
    rows = torch.arange(sources.shape[0], device=sources.device).unsqueeze(1)
    slots = sources.clamp(min=0)
    values = torch.cat([cache.read_values(layer, (rows, slots)).flatten(2) for layer in fusion.layers], -1)
    present = (sources >= 0).unsqueeze(-1)
    distances = (positions - 1 - sources).clamp(max=DISTANCES - 2)
    kinds = torch.where(sources >= 0, distances, DISTANCES - 1)
    read = fusion.values(values * present)
    return (read if total is None else total(read)) + fusion.distances[kinds]
