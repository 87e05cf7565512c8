"""What followed the last tokens of a text where they occurred before.

As drafts, such tokens cost no layers. Where a text repeats itself (code that is edited, answers that quote), they hold
often. Source: arXiv:2411.04975 (suffix matches over prompt and output).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

MIN_MATCH = 2
"""Tokens that have to repeat at least."""
MAX_MATCH = 32
"""Tokens up to which the longer of two matches is told."""
MAX_CANDIDATES = 16
"""Latest occurrences that are compared."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """An earlier occurrence of the text's last tokens."""

    length: int
    """Tokens that repeat."""
    tokens: list[int]
    """What followed them, up to the text's end."""
    foreign: bool = False
    """Whether another request's text has told."""

    def continuation(self, num_tokens: int) -> list[int]:
        """What followed, repeated where it reaches the end of the text itself; fewer at the end of a foreign one."""
        if self.foreign:
            return self.tokens[:num_tokens]
        return [self.tokens[i % len(self.tokens)] for i in range(num_tokens)]

    def agreement(self, tokens: Sequence[int]) -> int:
        """How many of the tokens that came were those that followed before."""
        pairs = zip(self.continuation(len(tokens)), tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


_UNKNOWN = Match(length=0, tokens=[])


class NgramIndex:
    """Where runs of tokens occurred in a text that grows."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._match: Match | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the text's next tokens."""
        if not tokens:
            return
        self._match, ends = _UNKNOWN, self._ends
        known = len(self._tokens)
        self._tokens += tokens
        # A run counts once something follows it: the text's end isn't found.
        first = max(0, known - MIN_MATCH)
        runs = zip(*(self._tokens[first + i : -1] for i in range(MIN_MATCH)), strict=False)
        for end, run in enumerate(runs, start=first + MIN_MATCH):
            ends.setdefault(run, []).append(end)

    def __len__(self) -> int:
        return len(self._tokens)

    def match(self) -> Match | None:
        """The longest run that ends the text and occurred before, of several the latest; None without any."""
        if self._match is _UNKNOWN:
            best = (0, 0)
            latest = self._tokens[: -MAX_MATCH - 1 : -1]
            for end in reversed(self._ends.get(tuple(self._tokens[-MIN_MATCH:]), [])[-MAX_CANDIDATES:]):
                length = self._common(end, latest)
                if length > best[0]:
                    best = (length, end)
                if length == MAX_MATCH:
                    break
            self._match = Match(length=best[0], tokens=self._tokens[best[1] :]) if best[0] else None
        return self._match

    def _common(self, end: int, latest: Sequence[int]) -> int:
        """Length of the run that ends both at `end` and at the text's end, whose last tokens are given backwards."""
        length = MIN_MATCH
        earlier = self._tokens[max(0, end - MAX_MATCH) : end]
        earlier.reverse()
        for token, other in zip(earlier[MIN_MATCH:], latest[MIN_MATCH:], strict=False):
            if token != other:
                break
            length += 1
        return length
