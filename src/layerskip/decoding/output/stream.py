"""A generation as an iterator over its events; many generations as an iterator over their results."""

from collections import deque
from collections.abc import Iterator, Sequence

from layerskip.decoding.engine import Engine
from layerskip.decoding.event import Event
from layerskip.decoding.output.events import GenerationResult, StreamEvent
from layerskip.decoding.output.writer import RowWriter
from layerskip.decoding.policy import Policy
from layerskip.decoding.request import Request
from layerskip.decoding.row import Row
from layerskip.text.tokenizer import Tokenizer


class GenerationStream(Iterator[StreamEvent]):
    """Iterator over the events of a generation.

    Ctrl-C while it works ends it: what was generated so far comes as `FinishEvent`s with reason `interrupted`. If the
    interruption hits the caller's own code instead, `results()` has the same.
    """

    def __init__(self, engine: Engine, writers: Sequence[RowWriter], *, show_drafts: bool = False) -> None:
        """Begin; nothing is computed before the first event is asked for.

        Args:
            engine: Where the rows run.
            writers: One for each row, in the order of the prompts.
            show_drafts: Include `DraftEvent`s.
        """
        self._engine, self._writers = engine, list(writers)
        self._by_row = {writer.row: writer for writer in writers}
        self._policies = [engine.policy_of(writer.row) for writer in writers]
        self._show_drafts = show_drafts
        self._events: Iterator[StreamEvent] = iter(())

    def __next__(self) -> StreamEvent:
        while True:
            try:
                event = next(self._events, None)
                if event is not None:
                    return event
                if self._finished:
                    raise StopIteration
                self._events = self._report(self._engine.step())
            except KeyboardInterrupt:
                self._events = self._end_all()

    @property
    def policy(self) -> Policy | None:
        """What plans the rounds of the first prompt; None without drafts."""
        return self._policies[0]

    def run(self) -> list[GenerationResult]:
        """Run to the end without reporting events; Ctrl-C is the caller's to handle here."""
        while not self._finished:
            for row, events in by_row(self._engine.step()).items():
                writer = self._by_row.get(row)
                if writer is not None and not writer.finished:
                    writer.take(events)
            for _ in self._report(()):
                pass
        return self.results()

    def results(self) -> list[GenerationResult]:
        """Results in the order of the prompts, as far as events have been reported; the others count as interrupted."""
        for _ in self._end_all():
            pass
        self._events = iter(())
        return [writer.result() for writer in self._writers]

    @property
    def _finished(self) -> bool:
        return all(writer.finished for writer in self._writers)

    def _report(self, events: Sequence[Event]) -> Iterator[StreamEvent]:
        """Turn what a step gave into events, one by one: a caller who stops in between has results up to there."""
        for event in events:
            writer = self._by_row.get(event.row)
            if writer is None or writer.finished:  # another stream's row, or one that has ended meanwhile
                continue
            if self._show_drafts and event.drafts:
                yield writer.preview(event)
            yield from writer.write(event)
            if event.ends:
                yield writer.finish()
        for writer in self._writers:  # ended from outside, as by another stream of the same session
            if not writer.finished and writer.row.finish_reason is not None:
                yield writer.finish()

    def _end_all(self) -> Iterator[StreamEvent]:
        """End the rows that haven't ended, after the last tokens that were reported."""
        for writer in self._writers:
            if not writer.finished:
                writer.interrupt()
                yield writer.finish()


def by_row(events: Sequence[Event]) -> dict[Row, list[Event]]:
    """A step's events, those of each row together."""
    found: dict[Row, list[Event]] = {}
    for event in events:
        found.setdefault(event.row, []).append(event)
    return found


def generate_each(
    engine: Engine, requests: Sequence[Request], tokenizer: Tokenizer | None
) -> Iterator[tuple[int, GenerationResult]]:
    """Results of many requests as they end; a request joins as soon as the engine has a free row.

    Args:
        engine: Without rows; no request is longer than its rows.
        requests: In the order in which they join.
        tokenizer: Makes text; without one, results carry ids only.

    Yields:
        A request's place, and its result.
    """
    waiting = deque(enumerate(requests))
    writers: dict[Row, tuple[int, RowWriter]] = {}
    while waiting or writers:
        while waiting and engine.free_rows:
            place, request = waiting.popleft()
            row = engine.add(request)
            writers[row] = place, RowWriter(engine, row, tokenizer, place)
        for row, events in by_row(engine.step()).items():
            place, writer = writers[row]
            writer.take(events)
            if row.finish_reason is not None:
                writer.finish()
                del writers[row]
                yield place, writer.result()
