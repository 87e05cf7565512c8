"""How many drafts each row of a batch has: those that are expected to gain the most tokens in the time of the round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerskip.decoding.policy import DraftSource, Plan


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
    plain = budget_of(chances, (0,) * num_rows, seconds)
    number, speed = _likeliest(chances, seconds, plain.speed)
    same, same_speed = _uniform(chances, seconds, plain.speed)
    if same_speed > speed:
        return budget_of(chances, tuple(min(same, len(each)) for each in chances), seconds)
    lengths = [0] * num_rows
    for _, depth, row in _order(chances)[:number]:
        lengths[row] = max(lengths[row], depth + 1)
    return budget_of(chances, tuple(lengths), seconds)


def _order(chances: Sequence[Sequence[float]]) -> list[tuple[float, int, int]]:
    """Drafts as (-chance, depth, row), the likeliest first.

    Of equally likely ones, the earlier ones in their rows come first: each has those that it follows before it.
    """
    return sorted((-chance, depth, row) for row, each in enumerate(chances) for depth, chance in enumerate(each))


def _likeliest(
    chances: Sequence[Sequence[float]], seconds: Callable[[int, int], float], speed: float
) -> tuple[int, float]:
    """The best number of likeliest drafts, and the tokens/s of all rows with it; 0 if none is better than `speed`."""
    tokens, longest, kept = float(len(chances)), 0, 0
    for number, (chance, depth, _) in enumerate(_order(chances), start=1):
        tokens -= chance
        if depth >= longest:
            longest = depth + 1
        found = tokens / seconds(number, longest)
        if found > speed:
            speed, kept = found, number
    return kept, speed


def _uniform(
    chances: Sequence[Sequence[float]], seconds: Callable[[int, int], float], speed: float
) -> tuple[int, float]:
    """The best number of drafts for all rows alike, as far as they have room, and the tokens/s with it."""
    tokens, total, kept = float(len(chances)), 0, 0
    for length in range(1, max(map(len, chances), default=0) + 1):
        added = [each[length - 1] for each in chances if len(each) >= length]
        tokens, total = tokens + sum(added), total + len(added)
        found = tokens / seconds(total, length)
        if found > speed:
            speed, kept = found, length
    return kept, speed


def budget_of(
    chances: Sequence[Sequence[float]], lengths: tuple[int, ...], seconds: Callable[[int, int], float]
) -> Budget:
    """What rows with these numbers of drafts may expect; arguments as for `share_out`."""
    gained = sum(sum(each[:length]) for each, length in zip(chances, lengths, strict=True))
    return Budget(lengths=lengths, tokens=len(lengths) + gained, seconds=seconds(sum(lengths), max(lengths)))


def plan_of(budget: Budget, source: DraftSource, exit_layer: int = 0) -> Plan | None:
    """The plan with these drafts; None without drafts."""
    most = max(budget.lengths)
    if not most:
        return None
    return Plan(
        source=source,
        exit_layer=exit_layer,
        num_speculations=most,
        lengths=() if min(budget.lengths) == most else budget.lengths,
        tokens_per_second=budget.speed / len(budget.lengths),
    )
