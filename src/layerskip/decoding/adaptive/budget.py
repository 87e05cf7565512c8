"""How many drafts each row of a batch has: those that are expected to gain the most tokens in the time of the round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Drafts of a round."""

    lengths: tuple[int, ...]
    """Of each row."""
    tokens: float
    """Tokens that all rows are expected to gain."""
    seconds: float
    """What the round is expected to take."""

    @property
    def speed(self) -> float:
        """Expected tokens/s of all rows together."""
        return self.tokens / self.seconds


def share_out(chances: Sequence[Sequence[float]], seconds: Callable[[int, int], float]) -> Budget:
    """Extend the row whose next draft is the likeliest to be accepted, as often as that raises the tokens/s of all.

    What is asked for is known before any draft is drawn. All numbers of drafts are compared, since the cost of another
    token may be small after one that costs much; so are rounds in which all rows have the same number.

    Args:
        chances: For each row the probability that its first 1, 2, ... drafts are all accepted, which never rises. Rows
            may have different numbers of them: those that they have room for.
        seconds: What a round takes with this many drafts of all rows together, of which the row that has most has this
            many.

    Returns:
        The best; no drafts if none gain.
    """
    num_rows = len(chances)
    best = Budget(lengths=(0,) * num_rows, tokens=float(num_rows), seconds=seconds(0, 0))
    # Of equally likely drafts, the earlier ones in their rows come first: each has those that it follows before it.
    order = sorted((-chance, depth, row) for row, each in enumerate(chances) for depth, chance in enumerate(each))
    lengths, tokens, longest, kept = [0] * num_rows, float(num_rows), 0, 0
    speed = best.speed
    for number, (chance, depth, _) in enumerate(order, start=1):
        tokens, longest = tokens - chance, max(longest, depth + 1)
        found = tokens / seconds(number, longest)
        if found > speed:
            speed, kept = found, number
    for _, depth, row in order[:kept]:
        lengths[row] = max(lengths[row], depth + 1)
    if kept:
        best = budget_of(chances, tuple(lengths), seconds)
    for length in range(1, max(map(len, chances), default=0) + 1):
        same = budget_of(chances, tuple(min(length, len(each)) for each in chances), seconds)
        if same.speed > best.speed:
            best = same
    return best


def budget_of(
    chances: Sequence[Sequence[float]], lengths: tuple[int, ...], seconds: Callable[[int, int], float]
) -> Budget:
    """What rows with these numbers of drafts may expect; arguments as for `share_out`."""
    gained = sum(sum(each[:length]) for each, length in zip(chances, lengths, strict=True))
    return Budget(lengths=lengths, tokens=len(lengths) + gained, seconds=seconds(sum(lengths), max(lengths)))
