"""Texts of requests that have ended, for drafts of others: what followed the same tokens there.

A server writes similar texts again and again. Where several texts had the same tokens, most of them tell what comes
next, not the latest: one text that went another way doesn't spoil the drafts of all that follow. Source:
arXiv:2411.04975 (drafts by how often they followed in earlier outputs).
"""

from collections import Counter
from collections.abc import Sequence

from layerskip.decoding.ngrams.index import MAX_CANDIDATES, MAX_MATCH, Match

LEAST_MATCH = 4
"""Tokens that have to be the same at least; shorter runs occur in any text."""
MOST_FOLLOWING = 32
"""Tokens of a continuation."""
STORED_TOKENS = 1 << 17
"""Tokens that are kept; each takes up to about 300 bytes."""

_END = -1
"""Stands between texts; no token."""


class SuffixStore:
    """Texts up to a number of tokens; the oldest go first."""

    def __init__(self, max_tokens: int = STORED_TOKENS) -> None:
        """Begin empty.

        Args:
            max_tokens: Tokens to keep at most, and as many ends of texts.
        """
        self._max_tokens = max_tokens
        self._tokens: list[int] = []
        """All texts, the oldest first, `_END` behind each."""
        self._first = 0
        """Tokens that were thrown out: places count from the first text ever."""
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """Of each run of `LEAST_MATCH` tokens that something follows, the places behind it, ascending."""
        self._lengths: list[int] = []
        """Tokens of each text."""
        self.version = 0
        """Another one whenever matches may have changed."""

    def __len__(self) -> int:
        return sum(self._lengths)

    def add(self, text: Sequence[int]) -> None:
        """Keep a text, or the end of one that is too long."""
        text = list(text[-self._max_tokens :])
        if len(text) <= LEAST_MATCH:  # no run that something follows
            return
        self._make_room(len(text))
        start = self._first + len(self._tokens)
        for end in range(LEAST_MATCH, len(text)):
            self._ends.setdefault(tuple(text[end - LEAST_MATCH : end]), []).append(start + end)
        self._tokens += [*text, _END]
        self._lengths.append(len(text))
        self.version += 1

    def match(self, tokens: Sequence[int], beyond: int) -> Match | None:
        """What mostly followed the longest run that ends a text and occurs in the store.

        Args:
            tokens: The text.
            beyond: Tokens that the run has to be longer than.
        """
        if beyond >= MAX_MATCH or not self._ends:
            return None
        last = list(tokens[-MAX_MATCH:])
        ends = [end - self._first for end in self._ends.get(tuple(last[-LEAST_MATCH:]), ())[-MAX_CANDIDATES:]]
        lengths = [self._common(end, last) for end in ends]
        longest = max(lengths, default=0)
        if longest <= beyond:
            return None
        best = [end for end, length in zip(ends, lengths, strict=True) if length == longest]
        return Match(length=longest, tokens=self._following(best), foreign=True)

    def _common(self, end: int, last: list[int]) -> int:
        """Length of the run that ends both at a place and with `last`."""
        tokens, length, most = self._tokens, LEAST_MATCH, min(len(last), end)
        if tokens[end - most : end] == last[len(last) - most :]:  # often all of it, and slices are compared in C
            return most
        while tokens[end - length - 1] == last[-length - 1]:
            length += 1
        return length

    def _following(self, ends: Sequence[int]) -> list[int]:
        """What followed most of some places, token by token; of equally many, the latest."""
        parts = [self._part(end) for end in ends]
        following: list[int] = []
        while any(part != parts[0] for part in parts):
            length = len(following)
            parts = [part for part in parts if len(part) > length]  # the longest is longer, or all would be equal
            tokens = [part[length] for part in parts]
            if tokens.count(tokens[0]) < len(tokens):
                counts = Counter(tokens)
                most = max(counts.values())
                chosen = next(token for token in reversed(tokens) if counts[token] == most)
                parts = [part for part in parts if part[length] == chosen]
            following.append(parts[0][length])
        return parts[0]

    def _part(self, end: int) -> list[int]:
        """What followed a place, up to the end of its text."""
        part = self._tokens[end : end + MOST_FOLLOWING]
        return part[: part.index(_END)] if _END in part else part

    def _make_room(self, num_tokens: int) -> None:
        """Throw out the oldest texts until so many tokens fit."""
        total, number, gone = len(self), 0, 0
        while total + num_tokens > self._max_tokens:
            length = self._lengths[number]
            self._forget(gone, length)
            total, number, gone = total - length, number + 1, gone + length + 1
        del self._tokens[:gone], self._lengths[:number]
        self._first += gone

    def _forget(self, start: int, length: int) -> None:
        """Take the runs of the oldest text out, which come first among the places of each."""
        for end in range(start + LEAST_MATCH, start + length):
            run = tuple(self._tokens[end - LEAST_MATCH : end])
            ends = self._ends[run]
            assert ends[0] == self._first + end
            if len(ends) == 1:
                del self._ends[run]
            else:
                del ends[0]
