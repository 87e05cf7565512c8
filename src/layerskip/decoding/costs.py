"""What the parts of a round cost on this machine: measured with the network itself, in seconds.

Shapes: B rows, n tokens of each row in one call, L layers, E exit, K drafts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from layerskip.model.decoder import Decoder

MEASURED_QUERIES = (1, 2, 3, 5, 9, 13)
"""Tokens in one call that are timed; others are interpolated."""
CONTEXT = 64
"""Tokens before those that are timed."""
REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one call over n tokens of each row; index n - 1."""

    num_layers: int
    layer: tuple[float, ...]
    """One layer."""
    fixed: tuple[float, ...]
    """All else that a call with a head needs: positions, embedding, norm and head, choosing tokens."""
    without_head: float
    """Positions and embedding of one token."""

    def step(self) -> float:
        """One autoregressive step."""
        return self.fixed[0] + self.num_layers * self.layer[0]

    def round(self, exit_layer: int, num_drafts: int) -> float:
        """Draft `num_drafts` tokens at an exit and verify them; at exit 0 drafts come for nothing."""
        n = min(num_drafts + 1, len(self.layer))
        verification = self.fixed[n - 1] + (self.num_layers - exit_layer) * self.layer[n - 1]
        if exit_layer == 0:
            return verification
        passes = (num_drafts + 1) * exit_layer * self.layer[0]
        return passes + num_drafts * self.fixed[0] + self.without_head + verification


def measure_costs(decoder: Decoder, num_rows: int) -> Costs:
    """Time the network's calls for a batch of `num_rows` rows.

    Takes some thirty forward passes. Nothing of it is kept in any cache but the one made here.
    """
    counts = [n for n in MEASURED_QUERIES if CONTEXT + n <= decoder.max_context] or [1]
    timer = CallTimer(decoder, num_rows, counts[-1])
    layer, fixed = [], []
    for n in counts:
        one, every = timer.seconds(0, 1, n), timer.seconds(0, decoder.num_layers, n)
        layer.append(max(0.0, every - one) / max(1, decoder.num_layers - 1))
        fixed.append(max(0.0, one - layer[-1]))
    without_head = max(0.0, timer.seconds(0, 1, 1, head=False) - layer[0])
    return Costs(
        num_layers=decoder.num_layers,
        layer=_interpolated(counts, layer),
        fixed=_interpolated(counts, fixed),
        without_head=without_head,
    )


class CallTimer:
    """Times calls of a network over tokens that follow some context."""

    def __init__(self, decoder: Decoder, num_rows: int, most: int, context: int = CONTEXT) -> None:
        """Make a cache for calls of up to `most` tokens in each row, after `context` tokens."""
        self._decoder, self._rows = decoder, num_rows
        context = min(context, decoder.max_context - most)
        self._first = [context] * num_rows
        self._cache = decoder.new_cache(num_rows, context + most)

    @torch.inference_mode()
    def seconds(
        self, start: int, stop: int, num_queries: int, *, head: bool = True, repetitions: int = REPETITIONS
    ) -> float:
        """Median seconds of positions, embedding, layers start..stop-1 and, with `head`, the likeliest tokens."""
        decoder, calls = self._decoder, self._decoder.layer_calls
        times = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            tokens = torch.zeros((self._rows, num_queries), dtype=torch.long, device=decoder.device)
            positions = decoder.place(self._cache, self._first, num_queries)
            hidden = decoder.run_layers(decoder.embed(tokens), positions, self._cache, start, stop)
            if head:
                decoder.unembed(hidden).argmax(-1).tolist()
            elif decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            times.append(time.perf_counter() - started)
        decoder.layer_calls = calls
        return median(times[1:])


def _interpolated(counts: Sequence[int], values: Sequence[float]) -> tuple[float, ...]:
    """Values at 1, 2, ... up to the last count, on lines between the measured ones."""
    found = []
    for n in range(1, counts[-1] + 1):
        above = next(i for i, count in enumerate(counts) if count >= n)
        if counts[above] == n:
            found.append(values[above])
            continue
        share = (n - counts[above - 1]) / (counts[above] - counts[above - 1])
        found.append(values[above - 1] + share * (values[above] - values[above - 1]))
    return tuple(found)
