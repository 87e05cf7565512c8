"""The values of an earlier token that an adapter reads (`model.torch.fusion`), as drafting will find them.

Shapes: B samples, T tokens of a sample, M values of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.model.positions import DISTANCES

SHARES = (0.45, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.04)
"""How often training reads values from each class of distance: first drafts are the most frequent."""


@dataclass(frozen=True, kw_only=True)
class EarlierValues:
    """What the tokens of a batch read."""

    values: Tensor
    """[B, T, M]; zeros where there is no such token."""
    kinds: Tensor
    """[B, T], classes of distances."""


def spread_layers(num_layers: int, count: int) -> Sequence[int]:
    """Layers whose values are read: `count` of them, or all if there are fewer, evenly spread up to the last one."""
    count = min(count, num_layers)
    return [round((i + 1) * num_layers / count) - 1 for i in range(count)]


def read_earlier(values: Tensor, position_ids: Tensor | None, *, spread: bool) -> EarlierValues:
    """Give each token the values of an earlier one of its own example.

    Args:
        values: [B, T, M], those of each token.
        position_ids: [B, T], from 0 in each example; counting up if not given.
        spread: Draw the distances, as often as `SHARES` says; otherwise all tokens read those of the token before.
    """
    rows, length, _ = values.shape
    places = torch.arange(length, device=values.device).expand(rows, -1)
    positions = places if position_ids is None else position_ids
    kinds = torch.zeros_like(places)
    if spread:
        shares = torch.tensor(SHARES, device=values.device)
        kinds = torch.multinomial(shares, rows * length, replacement=True).view(rows, length)
    back = kinds + 1
    kinds = torch.where(back > positions, DISTANCES - 1, kinds)
    sources = (places - back).clamp(min=0)
    present = kinds < DISTANCES - 1
    rows_of = torch.arange(rows, device=values.device).unsqueeze(1)
    return EarlierValues(values=values[rows_of, sources] * present.unsqueeze(-1), kinds=kinds)
