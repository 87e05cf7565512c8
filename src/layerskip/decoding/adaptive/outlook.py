"""What drafting at an exit promises, where drafts that became doubtful end a row's drafting or are given up.

How sure the early layers were of a draft says how likely it is accepted (`rates.py`). So a round is planned as two
thresholds rather than as a length: a row drafts on while the next draft is worth its time, and a draft is verified if
it is worth that. Both depend on how many tokens the time is worth, and that on how fast the best round is: planning
begins with the speed of plain steps and goes on from the speed that it has found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

ITERATIONS = 3
"""Times that thresholds are computed, each with the speed that the ones before promise; more change little."""
HALVINGS = 7
"""Of the interval that the threshold for drafting on is searched in."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a row may expect of a round."""

    accepted: float
    """Drafts that are accepted."""
    verified: float
    drawn: float
    passes: float
    """Passes of drafting, of all rows together: the drafts of the row that has most."""
    least: float
    """As in `StopRule`."""
    kept: float
    """As in `StopRule`."""
    tokens_per_second: float = 0.0
    """Of each row."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Drafts by how sure the early layers were of them."""

    rates: Sequence[float]
    """Acceptance rate of each class."""
    shares: Sequence[float]
    """Share of all drafts that each class has."""

    def worth(self, chance: float, price: float, *, gives_up: bool) -> float:
        """Tokens that another draft is expected to gain, less the price of verifying it.

        Args:
            chance: The probability that all drafts before it are accepted.
            price: Tokens that the time of verifying a draft is worth.
            gives_up: Whether a draft need not be verified.
        """
        gains = (chance * rate - price for rate in self.rates)
        pairs = zip(self.shares, gains, strict=True)
        return sum(share * (max(0.0, gain) if gives_up else gain) for share, gain in pairs)

    def least_chance(self, draw_price: float, price: float, *, gives_up: bool) -> float:
        """The chance from which on another draft is worth being drawn; above 1 if never."""
        if self.worth(1.0, price, gives_up=gives_up) < draw_price:
            return 2.0
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self.worth(middle, price, gives_up=gives_up) < draw_price:
                low = middle
            else:
                high = middle
        return high

    def follow(self, least: float, kept: float, most: int, num_rows: int) -> Outlook:
        """A round with these thresholds; chances of rows that draft on are taken to be what they are on average."""
        chance, going = 1.0, 1.0
        accepted = verified = drawn = passes = 0.0
        for _ in range(most):
            drawn += going
            passes += min(1.0, num_rows * going)
            share = gained = next_share = next_gained = 0.0
            for rate, part in zip(self.rates, self.shares, strict=True):
                after = chance * rate
                if after >= kept:
                    share += part
                    gained += part * after
                    if after >= least:
                        next_share += part
                        next_gained += part * after
            verified += going * share
            accepted += going * gained
            if next_share * going < 1e-3:
                break
            going, chance = going * next_share, next_gained / next_share
        return Outlook(accepted=accepted, verified=verified, drawn=drawn, passes=passes, least=least, kept=kept)


def best_outlook(
    classes: Classes,
    seconds: Callable[[Outlook], float],
    prices: Callable[[Outlook], tuple[float, float]],
    *,
    most: int,
    num_rows: int,
    speed: float,
    gives_up: bool,
) -> Outlook:
    """The thresholds with the highest expected tokens/s.

    Args:
        classes: How likely drafts are accepted.
        seconds: What a round takes.
        prices: Seconds for which one more draft in each row is drawn, and for which one more is verified, near that
            round.
        most: Drafts of a row at most.
        num_rows: B.
        speed: Tokens/s of each row without drafts.
        gives_up: Whether a draft that is drawn need not be verified.

    Returns:
        The best that was found; a single draft of each row where none is worth its time.
    """

    def promise(found: Outlook) -> Outlook:
        return replace(found, tokens_per_second=(1 + found.accepted) / seconds(found))

    best: Outlook | None = None
    near = Outlook(accepted=0, verified=1, drawn=1, passes=1, least=0, kept=0)
    for _ in range(ITERATIONS):
        draw, verify = (speed * seconds_ for seconds_ in prices(near))
        least = classes.least_chance(draw, verify, gives_up=gives_up)
        if least > 1.0:
            break
        found = classes.follow(least, verify if gives_up else 0.0, most, num_rows)
        near = promise(found)
        if best is not None and near.tokens_per_second <= best.tokens_per_second:
            break
        best, speed = near, max(speed, near.tokens_per_second)
    return best or promise(classes.follow(2.0, 0.0, 1, num_rows))
