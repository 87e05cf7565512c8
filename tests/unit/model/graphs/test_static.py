"""Shapes of whole rounds, positions and masks made on the device."""

import pytest
import torch

from layerskip.model.cache import KVCache
from layerskip.model.config.model_config import SLIDING
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.graphs.static import DevicePositions, slots_for


@pytest.mark.parametrize(
    ("live", "capacity", "slots"),
    [
        (1, 1000, 64),
        (64, 1000, 64),
        (65, 1000, 128),
        (600, 1000, 1001),
        (1500, 1000, 1001),
        (5, 20, 21),
        (512, 511, 512),
        (129, 4000, 256),
    ],
)
def test_slots(live: int, capacity: int, slots: int) -> None:
    assert slots_for(live, capacity) == slots


@pytest.mark.parametrize("first", [[0, 0, 0], [3, 3, 3], [0, 9, 30], [29, 12, 31]])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_positions_on_the_device_are_those_of_the_host(
    decoder: GraphDecoder, first: list[int], num_queries: int
) -> None:
    """Same slots and rotary factors; the same masks where the host makes any, and nothing to see beyond."""
    cache = KVCache(decoder.config, num_rows=3, capacity=32, dtype=torch.float32, device=torch.device("cpu"))
    theirs = decoder.place(cache, first, num_queries)
    ours = DevicePositions(decoder._rounds._parts, torch.tensor(first), num_queries, 33, 32, torch.tensor(first))
    written, expected = torch.zeros(3, 33, 1, 1), torch.zeros(3, 33, 1, 1)
    written[ours.slots], expected[theirs.slots] = 1.0, 1.0
    assert torch.equal(written, expected)
    for kind in set(decoder.config.layer_types):
        span, other = ours.span(kind), theirs.span(kind)
        counts = (torch.tensor(first).unsqueeze(1) + torch.arange(num_queries) < 32)[..., None, None]
        for name in ("cos", "sin"):
            assert torch.equal(getattr(span, name) * counts, getattr(other, name).expand(3, -1, -1, -1) * counts)
        assert span.mask is not None
        inside = span.mask[..., other.first_slot : other.last_slot]
        assert torch.equal(inside, torch.zeros_like(inside) if other.mask is None else other.mask.expand_as(inside))
        assert span.mask[..., : other.first_slot].isinf().all()
        assert span.mask[..., other.last_slot :].isinf().all()


def test_every_query_sees_something(decoder: GraphDecoder) -> None:
    """Rows without a text and rows beyond the capacity too: a query that sees nothing would be NaN."""
    assert SLIDING in decoder.config.layer_types
    for num_slots, first in [(33, [40, 32, 31]), (16, [0, 5, 9])]:
        positions = DevicePositions(decoder._rounds._parts, torch.tensor(first), 5, num_slots, 32, torch.tensor(first))
        mask = positions.span(SLIDING).mask
        assert mask is not None
        assert (mask == 0).any(-1).all()
