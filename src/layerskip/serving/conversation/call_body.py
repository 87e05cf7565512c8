"""The calls behind a mark: one JSON object, or a list of them."""

import json
import re
from collections.abc import Callable, Collection
from typing import Any
from uuid import uuid4

from layerskip.serving.conversation.deltas import Arguments, CallStart, Deltas
from layerskip.serving.conversation.formats import WHITE

SPACE = r"[ \t\r\n]*"
HEAD = re.compile(
    rf'\{{{SPACE}"name"{SPACE}:{SPACE}("(?:[^"\\]|\\.)*"){SPACE},{SPACE}"(?:arguments|parameters)"{SPACE}:{SPACE}\{{',
    re.DOTALL,
)
"""A call up to the beginning of its arguments."""


def new_id() -> str:
    """A name for a call."""
    return f"call_{uuid4().hex[:24]}"


class Brackets:
    """Which brackets of JSON are open, in text that comes character by character."""

    def __init__(self) -> None:
        """Begin outside."""
        self._open: list[str] = []
        self._in_string = self._escaped = False

    @property
    def depth(self) -> int:
        """Brackets that are open."""
        return len(self._open)

    def take(self, character: str) -> bool:
        """Read a character; False if it closes what isn't open."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
        elif character in "}]":
            return bool(self._open) and self._open.pop() == character
        return True


class CallBody:
    """Reads the calls behind a mark, character by character."""

    def __init__(
        self, names: Collection[str], first: int, out: Deltas, *, is_eager: bool, make_id: Callable[[], str]
    ) -> None:
        """Begin behind the mark.

        Args:
            names: Functions that there are.
            first: Place of the first call among the answer's.
            out: Where calls are put.
            is_eager: Put a call there as soon as its name is known; otherwise once all calls of this body are whole.
            make_id: Names calls.
        """
        self._names, self._next, self._out, self._is_eager, self._make_id = names, first, out, is_eager, make_id
        self.raw: list[str] = []
        """What was read and isn't part of a call that was given."""
        self.is_given = False
        """Whether a call was given already, or its beginning."""
        self._is_list = self._is_after_item = False
        self._brackets = Brackets()
        self._object: list[str] = []
        """The object that is read; empty outside."""
        self._is_begun = self._in_arguments = self._is_tried = False
        self._whole: list[tuple[str, str]] = []
        """Names and arguments of calls that wait for the others."""

    @property
    def next_index(self) -> int:
        """Place of the next call."""
        return self._next

    def take(self, character: str) -> bool | None:
        """Read a character.

        Returns:
            True at the end of the calls, False if these are no calls, None in between.
        """
        if self._in_arguments:
            return self._take_argument(character)
        self.raw.append(character)
        if self._object:
            return self._take_inside(character)
        if character in WHITE:
            return None
        if self._is_after_item:
            self._is_after_item = False
            return None if character == "," else self._finish() if character == "]" else False
        if character == "[" and not self._is_list:
            self._is_list = True
            return None
        return self._take_inside(character) if character == "{" else False

    def _take_inside(self, character: str) -> bool | None:
        self._object.append(character)
        if not self._brackets.take(character):
            return False
        if self._brackets.depth == 2 and not self._is_tried:
            self._is_tried = True  # a name has no brackets: arguments in their place are the first that has
            self._begin()
        return self._end_object() if self._brackets.depth == 0 else None

    def _begin(self) -> None:
        """Give a call's name, if this is where its arguments begin."""
        found = HEAD.fullmatch("".join(self._object)) if self._is_eager else None
        name = None if found is None else _loaded(found[1])
        if isinstance(name, str) and name in self._names:
            self._give(name, "{")
            self._is_begun = self._in_arguments = True

    def _take_argument(self, character: str) -> bool | None:
        if not self._brackets.take(character):
            self.raw.append(character)
            return False
        self._out.add(Arguments(index=self._next - 1, text=character))
        self._in_arguments = self._brackets.depth > 1
        return None

    def _end_object(self) -> bool | None:
        if not self._is_begun:
            call = interpret(_loaded("".join(self._object)), self._names)
            if call is None:
                return False
            if self._is_eager:
                self._give(*call)
            else:
                self._whole.append(call)
        else:
            self.raw = []
        self._object, self._is_begun, self._is_tried = [], False, False
        self._is_after_item = self._is_list
        return None if self._is_list else self._finish()

    def _finish(self) -> bool:
        for call in self._whole:
            self._give(*call)
        return True

    def _give(self, name: str, arguments: str) -> None:
        self._out.add(CallStart(index=self._next, id=self._make_id(), name=name))
        self._out.add(Arguments(index=self._next, text=arguments))
        self._next += 1
        self.is_given, self.raw = True, []


def interpret(value: Any, names: Collection[str]) -> tuple[str, str] | None:
    """Name and arguments of a call that is an object of JSON; None if it is no call of a function that there is."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # an object written into a string
        return (name, arguments) if isinstance(_loaded(arguments), dict) else None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, by an escape
        text = json.dumps(arguments)
    return name, text


def _loaded(text: str) -> Any:
    """A value of JSON; None if it isn't one."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    """JSON has no NaN and no infinity."""
    raise ValueError(constant)
