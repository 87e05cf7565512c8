"""Sequences whose keys and values stay in their rows after they have ended: a request that begins alike reads less.

Nothing is copied where a conversation goes on in its own row, and no memory is needed besides. Blocks (`blocks.py`)
take memory, but outlive the rows and are shared by any number of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST_COPIED = 16
"""Tokens: a shorter common beginning is read again rather than copied."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A sequence whose keys and values a row of the cache holds."""

    tokens: Sequence[int]
    num_layers: int
    """Layers that have keys and values of it; a request that runs more layers can't use them."""


class IdlePrefixes:
    """Which sequence each idle row of a cache holds, and which of them was used least recently."""

    def __init__(self) -> None:
        self._idle: dict[int, Prefix] = {}
        """By cache row, least recently used first."""

    def __len__(self) -> int:
        return len(self._idle)

    def get(self, place: int) -> Prefix | None:
        """What an idle row holds, if anything."""
        return self._idle.get(place)

    def put(self, place: int, prefix: Prefix) -> None:
        """Note what a row holds that has become idle."""
        self._idle.pop(place, None)
        self._idle[place] = prefix

    def remove(self, place: int) -> None:
        """The row is used for something else from here on."""
        self._idle.pop(place, None)

    def swap(self, place: int, other: int) -> None:
        """The two rows have exchanged their contents."""
        new = {place: other, other: place}
        self._idle = {new.get(key, key): prefix for key, prefix in self._idle.items()}

    def oldest(self, places: Iterable[int]) -> int:
        """Of some idle rows, the one to give up: one that holds nothing, or else the least recently used.

        Args:
            places: Cache rows; at least one.
        """
        order = {place: age for age, place in enumerate(self._idle)}
        return min(places, key=lambda place: order.get(place, -1)) if order else next(iter(places))

    def match(self, tokens: Sequence[int], num_layers: int, running: dict[int, Prefix]) -> tuple[int, int]:
        """The row, idle or running, whose sequence has the longest beginning in common with some tokens.

        Args:
            tokens: The beginning of a prompt.
            num_layers: Layers whose keys and values are needed.
            running: What running rows hold, by cache row.

        Returns:
            The row, and how many tokens it has in common: 0 if there is none.
        """
        best = (-1, 0)
        for place, prefix in [*self._idle.items(), *running.items()]:
            if prefix.num_layers >= num_layers and (common := common_length(prefix.tokens, tokens)) > best[1]:
                best = (place, common)
        return best


def common_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Length of the beginning that two sequences have in common, by comparing slices: those are compared in C."""
    low, high = 0, min(len(tokens), len(others))
    tokens, others = list(tokens[:high]), list(others[:high])
    while low < high:
        middle = (low + high + 1) // 2
        if tokens[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
