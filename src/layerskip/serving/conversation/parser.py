"""Calls of functions in an answer that comes in pieces. What is found doesn't depend on where the answer is cut."""

from collections.abc import Callable, Collection
from typing import Literal

from layerskip.serving.conversation.call_body import CallBody, new_id
from layerskip.serving.conversation.deltas import Content, Delta, Deltas
from layerskip.serving.conversation.formats import WHITE, CallFormat
from layerskip.text.stop_strings import overlap

State = Literal["start", "text", "body", "closing", "more"]


class PlainText:
    """An answer without calls, in the shape of `CallParser`."""

    num_calls = 0

    def push(self, text: str) -> list[Delta]:
        """Read a piece."""
        return [Content(text=text)] if text else []

    def finish(self) -> list[Delta]:
        """Nothing is held back."""
        return []


class CallParser:
    """Turns an answer into content and calls.

    White space around calls is dropped. What looked like a call and isn't one is content; nothing is ever an error.
    """

    def __init__(
        self, form: CallFormat, names: Collection[str], *, is_eager: bool, make_id: Callable[[], str] = new_id
    ) -> None:
        """Begin before the answer.

        Args:
            form: How the model writes calls.
            names: Functions that there are; calls of others are content.
            is_eager: Give the arguments of a call while they are being written. Only for a text that is held to a
                grammar: otherwise what was given may turn out to be no call.
            make_id: Names calls.
        """
        self._form, self._names, self._is_eager, self._make_id = form, frozenset(names), is_eager, make_id
        self._out = Deltas()
        self._mark = form.opening
        """What calls begin with from here on; empty: no calls are looked for."""
        self._state: State = "text" if form.opening else "start"
        self._held = ""
        """White space, and what may be the beginning of a mark."""
        self._front = ""
        """The mark of the calls that are read, and white space before it."""
        self._is_after_call = False
        self._body = self._new_body(0)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._body.next_index

    def push(self, text: str) -> list[Delta]:
        """Read a piece; gives what is certain now."""
        self._read_all(text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        """The rest, at the answer's end."""
        while self._state == "body" and not self._body.is_given:
            self._read_all(self._break())
        is_white = not self._held.strip(WHITE)
        if self._state == "start" or (self._state == "text" and not (self._is_after_call and is_white)):
            self._give(self._held)
        self._held = ""
        return self._out.take()

    def _read_all(self, text: str) -> None:
        while text:
            match self._state:
                case "start":
                    text = self._read_start(text)
                case "text":
                    text = self._read_text(text)
                case "body":
                    text = self._read_body(text)
                case "closing":
                    text = self._read_closing(text)
                case "more":
                    text = self._read_more(text)

    def _read_start(self, text: str) -> str:
        """Where calls have no mark: the answer is a call if it begins like one."""
        self._held += text[0]
        seen = self._held.lstrip(WHITE)
        if not seen:
            return text[1:]
        if self._form.optional.startswith(seen):
            return text[1:] if seen != self._form.optional else self._begin_body(self._held, text[1:])
        if seen[0] in "{[":
            return self._begin_body(self._held[:-1], text)
        return self._begin_text(self._held + text[1:])

    def _read_text(self, text: str) -> str:
        self._held += text
        place = self._held.find(self._mark) if self._mark else -1
        if place >= 0:
            before, rest = self._held[:place], self._held[place + len(self._mark) :]
            visible = before.rstrip(WHITE)
            self._give(visible)
            return self._begin_body(before[len(visible) :] + self._mark, rest)
        kept = overlap(self._held, self._mark)
        visible = self._held[: len(self._held) - kept].rstrip(WHITE)
        self._give(visible)
        self._held = self._held[len(visible) :]
        return ""

    def _read_body(self, text: str) -> str:
        for place, character in enumerate(text, 1):
            is_end = self._body.take(character)
            self._is_after_call |= self._body.is_given
            if is_end is False:
                return self._break() + text[place:]
            if is_end:
                self._held = ""
                self._state = "closing" if self._form.closing else "text" if self._form.opening else "more"
                return text[place:]
        return ""

    def _read_closing(self, text: str) -> str:
        self._held += text[0]
        seen = self._held.lstrip(WHITE)
        if not self._form.closing.startswith(seen):
            return self._begin_text(self._held + text[1:])
        if seen == self._form.closing:
            return self._begin_text(text[1:])
        return text[1:]

    def _read_more(self, text: str) -> str:
        """Where calls have no mark: a semicolon may stand before another one."""
        self._held += text[0]
        if text[0] in WHITE:
            return text[1:]
        if text[0] == ";":
            return self._begin_body(self._held, text[1:])
        return self._begin_text(self._held + text[1:])

    def _begin_text(self, rest: str) -> str:
        self._state, self._held = "text", ""
        return rest

    def _begin_body(self, front: str, rest: str) -> str:
        self._state, self._front, self._held = "body", front, ""
        self._body = self._new_body(self._body.next_index)
        return rest

    def _new_body(self, first: int) -> CallBody:
        return CallBody(self._names, first, self._out, is_eager=self._is_eager, make_id=self._make_id)

    def _break(self) -> str:
        """What is read isn't a call, or no whole one. Its mark is content; the rest is given back, to be read again."""
        if not self._body.is_given:
            self._give(self._front)
        return self._begin_text("".join(self._body.raw))

    def _give(self, text: str) -> None:
        if text:
            self._is_after_call = False
            self._out.add(Content(text=text))
