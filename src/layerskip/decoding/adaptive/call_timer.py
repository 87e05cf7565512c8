"""Seconds of single calls of a network, which may be measured one by one between other work."""

import time
from collections.abc import Callable, Generator
from statistics import median
from typing import Any, TypeVar

import torch

from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, StopRule

CONTEXT = 64
"""Tokens before those that are timed."""
REPETITIONS = 3
SLOW_SECONDS = 0.1
"""Calls that take longer are timed once: they vary less, and nobody wants to wait."""

Part = TypeVar("Part")
Result = TypeVar("Result")
Measuring = Generator[Part | None, None, Result]
"""Work that pauses after each call of the network, so that it can be done in between; partial results come out."""


def finish(work: Measuring[Any, Result]) -> Result:
    """Do all of it at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


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
    ) -> Measuring[Any, float]:
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

    def draft_timing(self, exit_layer: int, num_drafts: int, stop: StopRule | None = None) -> Measuring[Any, float]:
        """As `drafting`, call by call."""
        decoder, cache = self._decoder, self._cache
        tokens = torch.zeros((self._rows, 1), dtype=torch.long, device=decoder.device)
        request = DraftRequest(exit_layer=exit_layer, num_drafts=num_drafts, stop=stop)

        def call() -> None:
            decoder.draft(tokens, cache, request)

        return (yield from self._time(call, REPETITIONS))

    def _time(self, call: Callable[[], None], repetitions: int) -> Measuring[Any, float]:
        times: list[float] = []
        while len(times) <= repetitions and (len(times) < 2 or times[-1] < SLOW_SECONDS):
            provisional = self._decoder.provisional_rounds
            with self._decoder.uncounted(), torch.inference_mode():
                started = time.perf_counter()
                call()
                if self._decoder.device.type == "cuda":
                    torch.cuda.synchronize(self._decoder.device)
                seconds = self._decoder.stopwatch.since(started)
            if self._decoder.provisional_rounds == provisional:  # what isn't captured yet, or just now, says nothing
                times.append(seconds)
            yield None
        return self._summary(times[1:])
