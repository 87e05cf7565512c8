"""What an answer with calls consists of."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CallStart:
    """A call begins."""

    index: int
    """Its place among the answer's calls."""
    id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A piece of a call's arguments, as JSON."""

    index: int
    text: str


Delta = Content | CallStart | Arguments


@dataclass(frozen=True, kw_only=True)
class Call:
    """A whole call."""

    id: str
    name: str
    arguments: str
    """As JSON."""


class Deltas:
    """Deltas in their order; pieces of one thing become one piece."""

    def __init__(self) -> None:
        """Begin with none."""
        self._found: list[Delta] = []

    def add(self, delta: Delta) -> None:
        """Add one."""
        match (self._found[-1] if self._found else None, delta):
            case (Content(text=text), Content(text=more)):
                self._found[-1] = Content(text=text + more)
            case (Arguments(index=index, text=text) as last, Arguments(text=more)) if index == delta.index:
                self._found[-1] = replace(last, text=text + more)
            case _:
                self._found.append(delta)

    def take(self) -> list[Delta]:
        """Those that were added since the last call."""
        found, self._found = self._found, []
        return found


def together(deltas: Iterable[Delta]) -> tuple[str, list[Call]]:
    """Content and calls of a whole answer."""
    content: list[str] = []
    calls: list[Call] = []
    for delta in deltas:
        match delta:
            case Content(text=text):
                content.append(text)
            case CallStart(id=call_id, name=name):
                calls.append(Call(id=call_id, name=name, arguments=""))
            case Arguments(text=text):
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + text)
    return "".join(content), calls
