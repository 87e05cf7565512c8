"""What the parts of a round cost on this machine, in seconds: estimated, or measured with the network itself.

Shapes: B rows, n tokens of each row in one call, L layers, E exit, K drafts.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import torch

from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest

MEASURED_QUERIES = (1, 2, 3, 5, 9, 13)
"""Tokens in one call that are timed; others are interpolated."""
CONTEXT = 64
"""Tokens before those that are timed."""
REPETITIONS = 5
ROW_COST_CPU, ROW_COST_GPU = 0.25, 0.01
"""Estimated cost of each further token in a call, as a share of the first one's."""
BYTES_PER_SECOND = 1e10
"""Estimated; what counts is how plans compare, and rounds correct it."""
SLOW_SECONDS = 0.1
"""Calls that take longer are timed once: they vary less, and nobody wants to wait."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of verification over n tokens of each row (index n - 1), and of drafting."""

    num_layers: int
    layer: tuple[float, ...]
    """One layer."""
    fixed: tuple[float, ...]
    """All else that a call with a head needs: positions, embedding, norm and head, choosing tokens."""
    draft_layer: float
    """One layer for one token, while drafting."""
    draft_head: float
    """Norm, head and choice of a draft."""
    draft_fixed: float
    """All else of drafting, once a round."""
    adapters: Mapping[int, float] = field(default_factory=dict)
    """By exit that has an adapter: adapter, norm, head and choice of a draft."""
    shares_states: bool = True
    """Whether verification goes on from the states of drafting, which runs the last draft through its layers too."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Costs":
        """What `dataclasses.asdict` made JSON of.

        Raises:
            TypeError: Something else.
        """
        found: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}
        found["adapters"] = {int(exit_layer): seconds for exit_layer, seconds in found["adapters"].items()}
        return cls(**found)

    @property
    def most_drafts(self) -> int:
        """Drafts that a round may have at most for its costs to be known."""
        return len(self.layer) - 1

    def step(self) -> float:
        """One autoregressive step."""
        return self.fixed[0] + self.num_layers * self.layer[0]

    def drafting(self, exit_layer: int, num_drafts: int) -> float:
        """Write `num_drafts` tokens at an exit."""
        passes = (num_drafts + self.shares_states) * exit_layer * self.draft_layer
        return self.draft_fixed + passes + num_drafts * self.adapters.get(exit_layer, self.draft_head)

    def verification(self, exit_layer: int, num_drafts: int) -> float:
        """The layers from the exit on, and the head, over the drafts and the token before them."""
        n = min(num_drafts + 1, len(self.layer))
        return self.fixed[n - 1] + (self.num_layers - exit_layer) * self.layer[n - 1]

    def round(self, exit_layer: int, num_drafts: int) -> float:
        """Draft at an exit and verify; at exit 0 drafts come for nothing."""
        drafting = self.drafting(exit_layer, num_drafts) if exit_layer else 0.0
        return drafting + self.verification(exit_layer if self.shares_states else 0, num_drafts)


def estimate_costs(decoder: Decoder) -> Costs:
    """Costs by the bytes of weights that calls read, without running anything: how plans compare, not seconds."""
    depth, row = decoder.num_layers, ROW_COST_CPU if decoder.device.type == "cpu" else ROW_COST_GPU
    layer = decoder.weight_bytes(0, depth, head=False) / depth / BYTES_PER_SECOND
    head = decoder.weight_bytes(0, 0) / BYTES_PER_SECOND
    bare = next(exit_layer for exit_layer in range(1, depth + 2) if exit_layer not in decoder.adapted_exits)
    drafter = decoder.drafter(bare)
    calls = range(MEASURED_QUERIES[-1])
    return Costs(
        num_layers=depth,
        layer=tuple(layer * (1 + row * n) for n in calls),
        fixed=tuple(head * (1 + row * n) for n in calls),
        draft_layer=drafter.decoder.weight_bytes(0, 1, head=False) / BYTES_PER_SECOND,
        draft_head=drafter.decoder.weight_bytes(0, 0) / BYTES_PER_SECOND,
        draft_fixed=0.0,
        adapters={
            exit_layer: decoder.drafter(exit_layer).decoder.adapter_bytes() / BYTES_PER_SECOND
            for exit_layer in decoder.adapted_exits
        },
        shares_states=drafter.shares_states,
    )


def measure_costs(
    decoder: Decoder, num_rows: int, *, context: int = CONTEXT, queries: Sequence[int] = MEASURED_QUERIES
) -> Costs:
    """Time the network's calls: some thirty passes, or fifteen of a slow network; arguments as for `measuring`."""
    return finish(measuring(decoder, num_rows, context=context, queries=queries))


Result = TypeVar("Result")
Measuring = Generator[None, None, Result]
"""Work that pauses after each call of the network, so that it can be done in between."""


def finish(work: Measuring[Result]) -> Result:
    """Do all of it at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


def measuring(
    decoder: Decoder, num_rows: int, *, context: int = CONTEXT, queries: Sequence[int] = MEASURED_QUERIES
) -> Measuring[Costs]:
    """Time the network's calls one by one.

    Args:
        decoder: The network.
        num_rows: B.
        context: Tokens of each row before those that are timed.
        queries: Tokens in one call that are timed, ascending from 1; others are interpolated.
    """
    counts = [n for n in queries if context + n <= decoder.max_context] or [1]
    timer = CallTimer(decoder, num_rows, counts[-1], context, summary=min)  # whatever disturbs a call makes it longer
    depth = decoder.num_layers
    yield from timer.timing(0, depth, counts[-1])  # caches, clocks and threads get going
    layer, fixed = [], []
    for n in counts:
        one = yield from timer.timing(depth - 1, depth, n)
        every = yield from timer.timing(0, depth, n)
        layer.append(max(0.0, every - one) / max(1, depth - 1))
        fixed.append(max(0.0, one - layer[-1]))
    most = min(5, counts[-1] - 1)
    bare = [exit_layer for exit_layer in range(1, depth // 2 + 2) if exit_layer not in decoder.adapted_exits]
    first, middle = bare[0], bare[-1]
    draft_layer, draft_head, draft_fixed = layer[0], fixed[0], fixed[0]
    shares_states = decoder.drafter(first).shares_states
    adapters: dict[int, float] = {}
    if most > 1 and middle > first:
        single = yield from timer.draft_timing(first, 1)
        several = yield from timer.draft_timing(first, most)
        deep = yield from timer.draft_timing(middle, most)
        draft_layer = max(0.0, deep - several) / ((most + shares_states) * (middle - first))
        draft_head = max(0.0, (several - single) / (most - 1) - first * draft_layer)
        draft_fixed = max(0.0, single - (1 + shares_states) * first * draft_layer - draft_head)
        for exit_layer in decoder.adapted_exits:
            passes = (most + shares_states) * exit_layer * draft_layer
            seconds = yield from timer.draft_timing(exit_layer, most)
            adapters[exit_layer] = max(0.0, (seconds - draft_fixed - passes) / most)
    return Costs(
        num_layers=depth,
        layer=_interpolated(counts, layer),
        fixed=_interpolated(counts, fixed),
        draft_layer=draft_layer,
        draft_head=draft_head,
        draft_fixed=draft_fixed,
        adapters=adapters,
        shares_states=shares_states,
    )


class CallTimer:
    """Times calls of a network over tokens that follow some context, as greedy decoding makes them."""

    def __init__(
        self,
        decoder: Decoder,
        num_rows: int,
        most: int,
        context: int = CONTEXT,
        summary: Callable[[list[float]], float] = median,
    ) -> None:
        """Make a cache for calls of up to `most` tokens in each row, after `context` tokens.

        Several repetitions of a call are summarised by `summary`.
        """
        self._decoder, self._rows, self._summary = decoder, num_rows, summary
        context = min(context, decoder.max_context - most)
        self._cache = decoder.new_cache(num_rows, context + most)
        for row in range(num_rows):
            self._cache.commit(row, context)

    def seconds(
        self, start: int, stop: int, num_queries: int, *, head: bool = True, repetitions: int = REPETITIONS
    ) -> float:
        """Seconds of layers start..stop-1, of the embedding if these are the first, and of the head."""
        return finish(self.timing(start, stop, num_queries, head=head, repetitions=repetitions))

    def timing(
        self, start: int, stop: int, num_queries: int, *, head: bool = True, repetitions: int = REPETITIONS
    ) -> Measuring[float]:
        """As `seconds`, call by call."""
        decoder, cache, shape = self._decoder, self._cache, (self._rows, num_queries)

        def call() -> None:
            tokens = torch.zeros(shape, dtype=torch.long, device=decoder.device)
            positions = decoder.place(cache, cache.lengths, num_queries)
            inputs = tokens if start == 0 else decoder.embed(tokens)
            if head:
                decoder.choose(inputs, positions, cache, start, stop).tolist()
            else:
                hidden = decoder.embed(tokens) if start == 0 else inputs
                decoder.run_layers(hidden, positions, cache, start, stop)

        return (yield from self._time(call, repetitions))

    def drafting(self, exit_layer: int, num_drafts: int) -> float:
        """Seconds of drafting at an exit."""
        return finish(self.draft_timing(exit_layer, num_drafts))

    def draft_timing(self, exit_layer: int, num_drafts: int) -> Measuring[float]:
        """As `drafting`, call by call."""
        decoder, cache = self._decoder, self._cache
        tokens = torch.zeros((self._rows, 1), dtype=torch.long, device=decoder.device)
        request = DraftRequest(exit_layer=exit_layer, num_drafts=num_drafts)

        def call() -> None:
            decoder.draft(tokens, cache, request)

        return (yield from self._time(call, REPETITIONS))

    def _time(self, call: Callable[[], None], repetitions: int) -> Measuring[float]:
        times: list[float] = []
        while len(times) <= repetitions and (len(times) < 2 or times[-1] < SLOW_SECONDS):
            with self._decoder.uncounted(), torch.inference_mode():
                started = time.perf_counter()
                call()
                if self._decoder.device.type == "cuda":
                    torch.cuda.synchronize(self._decoder.device)
                times.append(time.perf_counter() - started)
            yield
        return self._summary(times[1:])


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
