"""Text and events of one row, from the tokens that it gains."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

from layerskip.decoding.engine import Engine
from layerskip.decoding.event import Event
from layerskip.decoding.output.events import DraftEvent, FinishEvent, GenerationResult, Source, TokenEvent
from layerskip.decoding.row import Row
from layerskip.text.detokenizer import Detokenizer, special_tokens
from layerskip.text.stop_strings import StopMatcher
from layerskip.text.tokenizer import Tokenizer


class RowWriter:
    """Turns a row's tokens into text, and ends the row where a stop string is complete."""

    def __init__(
        self,
        engine: Engine,
        row: Row,
        tokenizer: Tokenizer | None,
        index: int = 0,
        *,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """Begin after the row's prompt.

        Args:
            engine: Where the row runs.
            row: The row.
            tokenizer: Makes text; without one, events and results carry ids only.
            index: The prompt's place among the caller's.
            shown: Special tokens that are part of the text, though they usually give none, and their texts.
        """
        self._engine, self.row, self._index = engine, row, index
        self._shown = shown or {}
        self._detokenizer = Detokenizer(tokenizer, row.tokens) if tokenizer is not None else None
        self.stops: Sequence[str] = row.request.config.stop
        named = special_tokens(tokenizer) if self.stops and tokenizer is not None else {}
        self._matcher = StopMatcher(self.stops, named)
        self._pieces: list[str] = []
        self._num_written = 0
        self.finished = False

    def preview(self, event: Event) -> DraftEvent:
        """The drafts that were verified, with the text that they would have given."""
        text = self._detokenizer.peek(event.drafts) if self._detokenizer is not None else ""
        assert event.drafter is not None
        return DraftEvent(index=self._index, token_ids=event.drafts, text=text, drafter=event.drafter)

    def spell(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """The text that each of some tokens would add, one after the other, without adding them."""
        if self._detokenizer is None:
            return ("",) * len(tokens)
        detokenizer = copy(self._detokenizer)  # attributes are replaced, never changed in place
        return tuple(self._shown.get(token) or detokenizer.push(token) for token in tokens)

    def write(self, event: Event) -> Iterator[TokenEvent]:
        """Events of the row's new tokens; ends the row where a stop string is complete."""
        for i, token in enumerate(event.tokens):
            piece, stop = "", None
            if self._detokenizer is not None:
                silent = self._shown.get(token) or self._matcher.marks.get(token, "")
                piece, stop = self._matcher.push(self._detokenizer.push(token) + silent)
            self._num_written += 1
            self._pieces.append(piece)
            if stop is not None:
                self._engine.finish(self.row, "stop", stop, length=self._num_written)
            yield TokenEvent(
                index=self._index,
                token_id=token,
                text=piece,
                source=_source(i, event),
                logprobs=event.logprobs[i] if event.logprobs else None,
            )
            if stop is not None:
                return

    def take(self, events: Sequence[Event]) -> None:
        """As `write` of each, without their events, which takes less time where there are no stop strings."""
        if self.stops or self._shown:
            for event in events:
                for _ in self.write(event):
                    pass
            return
        tokens = [token for event in events for token in event.tokens]
        self._num_written += len(tokens)
        if self._detokenizer is not None:
            self._pieces.append(self._detokenizer.push(*tokens))

    def interrupt(self) -> None:
        """End the row after the last token that was written; tokens without events are dropped."""
        if self.row.finish_reason is None or self._num_written < len(self.row.output):
            self._engine.finish(self.row, "interrupted", length=self._num_written)

    def finish(self) -> FinishEvent:
        """The end of the row: the text that was held back, and the result."""
        text = self._matcher.flush()  # nothing after a stop string; otherwise what looked like the beginning of one
        self._pieces.append(text)
        self.finished = True
        return FinishEvent(index=self._index, text=text, result=self.result())

    def result(self) -> GenerationResult:
        """What was generated; the row has ended."""
        row, request = self.row, self.row.request
        assert row.finish_reason is not None
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=row.output,
            finish_reason=row.finish_reason,
            stop_reason=row.stop_reason,
            seed=request.seed,
            stats=row.recorder.finish(row.prompt_length, len(row.output)),
            logprobs=None if request.config.logprobs is None else tuple(row.logprobs),
            prompt_logprobs=None if request.prompt_logprobs is None else tuple(row.prompt_logprobs),
        )


def _source(position: int, event: Event) -> Source:
    if position < event.num_accepted:
        return "accepted"
    if not event.drafts:
        return "decoded"
    return "bonus" if event.num_accepted == len(event.drafts) else "corrected"
