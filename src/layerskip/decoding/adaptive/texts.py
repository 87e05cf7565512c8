"""What drafts from the sequences themselves promise: the tokens that followed where the last ones occurred before."""

from collections.abc import Callable, Collection, Sequence

from layerskip.decoding.adaptive.budget import plan_of, share_out
from layerskip.decoding.adaptive.rates import ENOUGH_TOKENS, AcceptanceRates
from layerskip.decoding.ngrams.index import Match

REPEATED = (2, 4, 8, 16)
"""Numbers of repeated tokens that are told apart: the least of each class of matches (`AcceptanceRates.of_match`)."""


def chances_after(matches: Sequence[Match | None], rates: Sequence[AcceptanceRates], most: int) -> list[list[float]]:
    """For each row the probability that the first 1, 2, ... `most` drafts are all accepted; none without a match.

    Args:
        matches: Of each row.
        rates: What is known of each row's kind.
        most: Drafts of a row at most.
    """
    return [
        [] if match is None else known.match_chances(match.length, most, foreign=match.foreign)
        for match, known in zip(matches, rates, strict=True)
    ]


def observe_match(match: Match, tokens: Sequence[int], rates: AcceptanceRates) -> None:
    """Learn from the tokens that really followed a match, whether they were drafted or not."""
    accepted, guesses = match.agreement(tokens), match.continuation(len(tokens))
    rates.observe_match(match.length, accepted, min(accepted + 1, len(guesses)), foreign=match.foreign)


def worth_watching(
    rates: Collection[AcceptanceRates],
    num_rows: int,
    most: int,
    seconds: Callable[[int, int], float],
    speed: float,
) -> int:
    """The least number of repeated tokens after which a row's text would draft better, or might; 0: none.

    Args:
        rates: What is known of the kinds of rows that run.
        num_rows: B.
        most: Drafts of a row at most.
        seconds: What a round takes (`RoundTimes.of_rows`).
        speed: Tokens/s of each row without drafts from the text.
    """
    others = [list[float]()] * (num_rows - 1)
    for length in REPEATED:
        for known in rates:
            if known.of_match(length).long.tried < ENOUGH_TOKENS:  # too few have been seen to tell
                return length
            plan = plan_of(share_out([known.match_chances(length, most), *others], seconds), "text")
            if plan is not None and plan.tokens_per_second > speed:
                return length
    return 0
