"""Stop strings in text that comes in pieces."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

FIRST_MARK = 0xD800
"""Code points from here on, surrogates, are in no text and can stand for special tokens in one."""
MOST_SPELLINGS = 64
"""A special token in a stop string may be written with ordinary tokens; so many combinations are looked for at most."""


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one.

    Special tokens give no text. Those that a stop string names are *marked* in the pieces, by characters that no text
    has, so that the stop string is found whether it comes as the token or in ordinary letters.
    """

    def __init__(self, stops: Sequence[str], special: Mapping[int, str] | None = None) -> None:
        """Prepare.

        Args:
            stops: The stop strings.
            special: Special tokens, and what they are called.
        """
        self._stops = tuple(stops)
        self._held = ""
        named = {index: text for index, text in (special or {}).items() if any(text in stop for stop in stops if text)}
        self.marks = {index: chr(FIRST_MARK + place) for place, index in enumerate(named)}
        """What a piece has to have in place of a special token."""
        self._unmark = str.maketrans(dict.fromkeys(self.marks.values()))
        texts = {text: self.marks[index] for index, text in named.items()}
        self._marked = [
            (spelling, stop)
            for stop in stops
            for spelling in islice(_spellings(stop, texts), MOST_SPELLINGS)
            if spelling != stop
        ]

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add a piece of text.

        Returns:
            The text that is certain now, and the stop string that was found, if any; nothing follows it. No marks.
        """
        text = self._held + piece
        shown = self._visible(text)
        places = [(shown.find(stop), stop) for stop in self._stops if stop in shown]
        places += [(len(self._visible(text[: text.find(s)])), stop) for s, stop in self._marked if s in text]
        if places:
            self._held = ""
            place, stop = min(places)
            return shown[:place], stop
        held = max((overlap(shown, stop) for stop in self._stops), default=0)
        if self._marked:
            held = _length_with(text, held, self._unmark)
            held = max(held, *(overlap(text, spelling) for spelling, _ in self._marked))
        self._held = text[len(text) - held :]
        return self._visible(text[: len(text) - held]), None

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string was found."""
        text, self._held = self._held, ""
        return self._visible(text)

    def _visible(self, text: str) -> str:
        return text.translate(self._unmark) if self.marks else text


def _spellings(stop: str, marks: Mapping[str, str]) -> Iterator[str]:
    """A stop string with marks in place of special tokens that it names: first of all of them, then of fewer."""
    places = ((place, text) for place in range(len(stop)) for text in marks if stop.startswith(text, place))
    found = min(places, default=None, key=lambda item: (item[0], -len(item[1])))
    if found is None:
        yield stop
        return
    start = found[0]
    for text in sorted((text for text in marks if stop.startswith(text, start)), key=len, reverse=True):
        for rest in _spellings(stop[start + len(text) :], marks):
            yield stop[:start] + marks[text] + rest
    for rest in _spellings(stop[start + 1 :], marks):
        yield stop[: start + 1] + rest


def _length_with(text: str, number: int, unmark: Mapping[int, Any]) -> int:
    """Length of the end of a text that holds so many characters that aren't marks."""
    length = 0
    while number:
        length += 1
        number -= ord(text[-length]) not in unmark
    return length


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
