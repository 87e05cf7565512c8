"""A generation as an iterator over its events; many generations as an iterator over their results."""

from collections import deque
from collections.abc import Iterator, Sequence

from layerskip.decoding.engine import Engine
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
        self._events: deque[StreamEvent] = deque()

    def __next__(self) -> StreamEvent:
        while not self._events:
            if all(writer.finished for writer in self._writers):
                raise StopIteration
            try:
                self._step(tells=True)
            except KeyboardInterrupt:
                self._finish_all()
        return self._events.popleft()

    @property
    def policy(self) -> Policy | None:
        """What plans the rounds of the first prompt; None without drafts."""
        return self._policies[0]

    def run(self) -> list[GenerationResult]:
        """Run to the end without reporting events; Ctrl-C is the caller's to handle here."""
        while not all(writer.finished for writer in self._writers):
            self._step(tells=False)
            self._events.clear()
        return self.results()

    def results(self) -> list[GenerationResult]:
        """Results in the order of the prompts; rows that haven't ended count as interrupted."""
        self._finish_all()
        self._events.clear()
        return [writer.result() for writer in self._writers]

    def _step(self, *, tells: bool) -> None:
        """Take a step of the engine, and turn what it gave into events."""
        for event in self._engine.step():
            writer = self._by_row.get(event.row)
            if writer is None or writer.finished:  # another stream's row, or one that has ended meanwhile
                continue
            if self._show_drafts and event.drafts:
                self._events.append(writer.preview(event))
            if tells:
                self._events.extend(writer.write(event))
            else:
                writer.take(event)
            if event.row.finish_reason is not None:
                self._events.append(writer.finish())
        for writer in self._writers:  # ended from outside, as by another stream of the same session
            if not writer.finished and writer.row.finish_reason is not None:
                self._events.append(writer.finish())

    def _finish_all(self) -> None:
        for writer in self._writers:
            if not writer.finished:
                writer.interrupt()
                self._events.append(writer.finish())


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
        for event in engine.step():
            place, writer = writers[event.row]
            writer.take(event)
            if event.row.finish_reason is not None:
                writer.finish()
                del writers[event.row]
                yield place, writer.result()
