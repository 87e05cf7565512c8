"""How much of the prompts a step reads while other rows generate: as much as takes about two of their rounds.

Reading is timed, by the number of tokens: many at once take less time for each. A step reads at most twice as many as
have been timed, so that a wrong expectation costs little.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from statistics import median

LEAST_TOKENS = 4
"""Tokens that a step reads in any case. Where the weights decide, so few take about as long as one, and the next step
reads more; where attention to a long text decides, more at once aren't faster."""
READING_ROUNDS = 2.0
"""Rounds that reading may take as long as."""
KNOWN_ROUNDS = 32
"""Latest rounds of which the lower quartile counts: some measure costs, and some wait for other work of the machine.
If those counted, reading would take longer just when everything does."""
USUAL_ROUNDS = 4.0
"""Times the usual round that reading may take at most. Rounds become long for a while, as when a text repeats itself
and drafts itself: reading isn't to double what is unusual already."""
REMEMBERED_ROUNDS = 512
"""Latest rounds whose median is the usual one."""
NEW_WEIGHT = 0.5
"""Weight of the latest time against the ones before it."""


class ReadingPace:
    """Seconds of rounds and of reading, and the tokens to read that follow from them."""

    def __init__(self, most_tokens: int) -> None:
        """Begin without knowledge.

        Args:
            most_tokens: Tokens that a step reads at most, whoever waits.
        """
        self._most_tokens = most_tokens
        self._rounds: deque[float] = deque(maxlen=REMEMBERED_ROUNDS)
        self._seconds: dict[int, float] = {}
        """Of a token, by the class of size of what is read at once: class c has 2^c to 2^(c + 1) - 1 tokens."""

    def observe_round(self, seconds: float) -> None:
        """Learn how long rows that generate wait anyway: for one round of each."""
        self._rounds.append(seconds)

    def observe_reading(self, num_tokens: int, seconds: float) -> None:
        """Learn how long tokens took that were read at once, those of padding included."""
        size, latest = num_tokens.bit_length() - 1, seconds / num_tokens
        self._seconds[size] = latest + (1 - NEW_WEIGHT) * (self._seconds.get(size, latest) - latest)

    def tokens(self) -> int:
        """Tokens to read in a step in which other rows generate."""
        if self._rounds:
            latest = sorted(islice(reversed(self._rounds), KNOWN_ROUNDS))
            wanted = min(READING_ROUNDS * latest[len(latest) // 4], USUAL_ROUNDS * median(self._rounds))
            for size in sorted(self._seconds, reverse=True):
                affordable = int(wanted / max(self._seconds[size], 1e-12))
                if affordable >= 1 << size:  # fewer tokens at once take longer each: a smaller class has to tell
                    return max(LEAST_TOKENS, min(affordable, 2 << size, self._most_tokens))
        return LEAST_TOKENS


def choose_prompts(unread: Sequence[int], places: Sequence[int], budget: int, *, ragged: bool) -> dict[int, int]:
    """Which prompts a step reads, in the order in which they arrived.

    Args:
        unread: Tokens of each prompt that aren't read yet, in the order in which the prompts arrived.
        places: Row of each in its batch.
        budget: Tokens of the block at most, padding included; exceeded for none but the first prompt's token.
        ragged: Whether rows of a block may have different numbers of tokens.

    Returns:
        By row of the batch, tokens to read. A ragged block is as many as the budget has room for. In a rectangle, rows
        lie one behind the other: the first prompt, and those after it that fit whole beside it.
    """
    if not ragged:
        return _rectangle(unread, places, budget)
    counts: dict[int, int] = {}
    left = max(1, budget)
    for number, place in zip(unread, places, strict=True):
        if left == 0:
            break
        counts[place] = min(number, left)
        left -= counts[place]
    return counts


def _rectangle(unread: Sequence[int], places: Sequence[int], budget: int) -> dict[int, int]:
    size, rows = max(1, min(unread[0], budget)), range(places[0], places[0] + 1)
    if size == unread[0]:
        for rest, place in zip(unread[1:], places[1:], strict=True):
            widest = max(size, rest)
            if (len(rows) + 1) * widest > budget or place not in (rows.start - 1, rows.stop):
                break
            size, rows = widest, range(min(rows.start, place), max(rows.stop, place + 1))
    numbers = dict(zip(places, unread, strict=True))
    return {place: min(size, numbers[place]) for place in rows}
