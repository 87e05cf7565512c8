"""A generation as its user sees it: events with text, and results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from layerskip.decoding.batch import Batch, FinishReason, Row
from layerskip.decoding.engine import Committed, Drafted, decode
from layerskip.decoding.policy import Policy
from layerskip.decoding.stats import GenerationStats
from layerskip.text.detokenizer import Detokenizer, special_tokens
from layerskip.text.stop_strings import StopMatcher
from layerskip.text.tokenizer import Tokenizer

Source = Literal["decoded", "accepted", "corrected", "bonus"]
"""Where a token comes from: plain decoding; a draft that holds; the target, in place of a draft that doesn't; the
target, after drafts that all hold."""


@dataclass(frozen=True, kw_only=True)
class DraftEvent:
    """Drafts that are about to be verified; the next tokens of this prompt say which of them hold."""

    index: int
    """The prompt's place in the call."""
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One token of the result."""

    index: int
    """The prompt's place in the call."""
    token_id: int
    text: str
    """Text that is certain with this token; empty while a character is incomplete or a stop string possible."""
    source: Source


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What was written after one prompt."""

    text: str
    """Without special tokens and without the stop string; empty if the checkpoint has no tokenizer."""
    token_ids: list[int]
    """Up to and including the end-of-sequence token, or the token that completed a stop string."""
    finish_reason: FinishReason
    """stop: end-of-sequence token or stop string; length: no more tokens allowed; interrupted: by the user."""
    stop_reason: int | str | None
    """Which token or string stopped it."""
    seed: int
    """Seed that was used; with it, the same call writes the same text."""
    stats: GenerationStats


@dataclass(frozen=True, kw_only=True)
class FinishEvent:
    """A prompt's generation has ended."""

    index: int
    """The prompt's place in the call."""
    text: str
    """Text that was held back and is certain now."""
    result: GenerationResult


StreamEvent = DraftEvent | TokenEvent | FinishEvent


class GenerationStream(Iterator[StreamEvent]):
    """Iterator over the events of a generation.

    Ctrl-C while it works ends it: what was written so far comes as `FinishEvent`s with reason `interrupted`. If the
    interruption hits the caller's own code instead, `results()` has the same.
    """

    def __init__(self, batch: Batch, tokenizer: Tokenizer | None, *, show_drafts: bool = False) -> None:
        """Begin; nothing is computed before the first event is asked for.

        Args:
            batch: Rows to write, from `loop.make_batch`.
            tokenizer: Makes text; without one, events and results carry ids only.
            show_drafts: Include `DraftEvent`s.
        """
        self._rows = list(batch.rows)
        self._policy = batch.policy
        self._tells = True
        self._writers = [_RowWriter(row, tokenizer, batch.config.stop) for row in self._rows]
        self._events = self._run(decode(batch, show_drafts=show_drafts))

    def __next__(self) -> StreamEvent:
        try:
            return next(self._events)
        except KeyboardInterrupt:
            self._events = self._finish_all()
            return next(self._events)

    @property
    def policy(self) -> Policy:
        """What plans the rounds."""
        return self._policy

    def run(self) -> list[GenerationResult]:
        """Run to the end without reporting events; Ctrl-C is the caller's to handle here."""
        self._tells = False
        for _ in self._events:
            pass
        return self.results()

    def results(self) -> list[GenerationResult]:
        """Results in the order of the prompts; texts that haven't ended count as interrupted."""
        for _ in self._finish_all():
            pass
        self._events = iter(())
        return [writer.result() for writer in self._writers]

    def _run(self, events: Iterator[Drafted | Committed]) -> Iterator[StreamEvent]:
        for event in events:
            writer = self._writers[event.row.index]
            if isinstance(event, Drafted):
                yield DraftEvent(index=event.row.index, token_ids=event.tokens, text=writer.preview(event.tokens))
                continue
            if self._tells or writer.stops:
                yield from writer.write(event)
            else:
                writer.add(event)
            if event.row.finish_reason is not None:
                yield writer.finish()

    def _finish_all(self) -> Iterator[StreamEvent]:
        for writer in self._writers:
            if not writer.finished:
                writer.interrupt()
                yield writer.finish()


class _RowWriter:
    """Text and events of one row."""

    def __init__(self, row: Row, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._row = row
        self._detokenizer = Detokenizer(tokenizer, row.tokens) if tokenizer is not None else None
        self.stops = tuple(stops)
        named = special_tokens(tokenizer) if stops and tokenizer is not None else {}
        self._stops = StopMatcher(stops, named)
        self._pieces: list[str] = []
        self._num_written = 0
        self.finished = False

    def preview(self, tokens: Sequence[int]) -> str:
        return self._detokenizer.peek(tokens) if self._detokenizer is not None else ""

    def write(self, event: Committed) -> Iterator[TokenEvent]:
        """Events of newly committed tokens; ends the row where a stop string is complete."""
        for i, token in enumerate(event.tokens):
            piece, stop = "", None
            if self._detokenizer is not None:
                piece, stop = self._stops.push(self._detokenizer.push(token) + self._stops.marks.get(token, ""))
            self._num_written += 1
            self._pieces.append(piece)
            if stop is not None:
                self._row.finish("stop", stop, length=self._num_written)
            yield TokenEvent(index=self._row.index, token_id=token, text=piece, source=_source(i, event))
            if stop is not None:
                return

    def add(self, event: Committed) -> None:
        """Take newly committed tokens, of which nobody wants to hear before the end; not with stop strings."""
        self._num_written += len(event.tokens)
        if self._detokenizer is not None:
            self._pieces.append(self._detokenizer.push(*event.tokens))

    def interrupt(self) -> None:
        """End the row where its events ended; tokens that were committed but not told yet are dropped."""
        if self._row.finish_reason is None or self._num_written < len(self._row.output):
            self._row.finish("interrupted", length=self._num_written)

    def finish(self) -> FinishEvent:
        text = self._stops.flush()  # after a stop string nothing; otherwise what looked like the beginning of one
        self._pieces.append(text)
        self.finished = True
        return FinishEvent(index=self._row.index, text=text, result=self.result())

    def result(self) -> GenerationResult:
        row = self._row
        assert row.finish_reason is not None
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=row.output,
            finish_reason=row.finish_reason,
            stop_reason=row.stop_reason,
            seed=row.seed,
            stats=row.recorder.finish(row.prompt_length, len(row.output)),
        )


def _source(position: int, event: Committed) -> Source:
    if position < event.num_accepted:
        return "accepted"
    if event.num_drafted == 0:
        return "decoded"
    return "bonus" if event.num_accepted == event.num_drafted else "corrected"
