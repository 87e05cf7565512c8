"""Where the end of a text occurred before, and what followed."""

import random

from layerskip.decoding.ngrams.index import MAX_MATCH, MIN_MATCH, Match, NgramIndex


def index_of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


def match_of(tokens: list[int]) -> Match:
    match = index_of(tokens).match()
    assert match is not None
    return match


def test_nothing_repeats() -> None:
    for tokens in ([], [1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 1]):
        assert index_of(tokens).match() is None


def test_what_followed() -> None:
    match = match_of([1, 2, 3, 4, 5, 1, 2])
    assert (match.length, match.tokens) == (2, [3, 4, 5, 1, 2])
    assert match.continuation(3) == [3, 4, 5]


def test_the_longest_match_wins_and_of_equal_ones_the_latest() -> None:
    assert match_of([9, 1, 2, 7, 1, 2, 8, 5, 9, 1, 2]).continuation(1) == [7]
    assert match_of([5, 1, 2, 7, 6, 1, 2, 8, 4, 1, 2]).continuation(1) == [8]


def test_a_continuation_repeats_itself_at_the_end_of_the_text() -> None:
    assert match_of([1, 2, 3, 1, 2, 3, 1, 2]).continuation(7) == [3, 1, 2, 3, 1, 2, 3]
    assert match_of([7, 7, 7]).continuation(3) == [7, 7, 7]


def test_how_much_of_it_came() -> None:
    match = Match(length=2, tokens=[3, 4])
    assert match.agreement([3, 4, 3, 4]) == 4
    assert match.agreement([3, 4, 4]) == 2
    assert match.agreement([9]) == 0


def test_growing_by_pieces_is_the_same_as_at_once() -> None:
    pick = random.Random(0)
    tokens = [pick.randrange(4) for _ in range(200)]
    index = NgramIndex()
    done = 0
    while done < len(tokens):
        size = pick.randrange(1, 6)
        index.extend(tokens[done : done + size])
        done = min(len(tokens), done + size)
        assert len(index) == done
        assert index.match() == index.match() == index_of(tokens[:done]).match()


def test_matches_against_a_plain_search() -> None:
    pick = random.Random(1)
    for _ in range(50):
        tokens = [pick.randrange(5) for _ in range(60)]
        match = index_of(tokens).match()
        lengths = [
            next((n for n in range(min(MAX_MATCH, at), 0, -1) if tokens[at - n : at] == tokens[-n:]), 0)
            for at in range(MIN_MATCH, len(tokens))
        ]
        assert (match.length if match else 0) == (max(lengths) if max(lengths) >= MIN_MATCH else 0)
        if match:
            end = len(tokens) - len(match.tokens)
            assert tokens[end - match.length : end] == tokens[-match.length :]
