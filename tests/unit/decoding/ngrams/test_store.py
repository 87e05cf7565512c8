"""Texts of requests that have ended: what followed the same tokens in most of them."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.ngrams.index import MAX_MATCH, Match
from layerskip.decoding.ngrams.store import LEAST_MATCH, MOST_FOLLOWING, SuffixStore
from layerskip.decoding.request import Request
from layerskip.decoding.row import Row

RUN = [1, 2, 3, 4]


def store_of(*texts: Sequence[int], max_tokens: int = 1000) -> SuffixStore:
    store = SuffixStore(max_tokens)
    for text in texts:
        store.add(text)
    return store


def following(store: SuffixStore, tokens: Sequence[int]) -> list[int]:
    match = store.match(tokens, 0)
    return [] if match is None else match.tokens


def test_what_followed_elsewhere() -> None:
    store = store_of([7, *RUN, 5, 6])
    match = store.match([9, *RUN], 0)
    assert match == Match(length=4, tokens=[5, 6], foreign=True)
    assert match.continuation(5) == [5, 6]  # not repeated: the text ended there
    assert match.continuation(1) == [5]
    assert store.match([7, *RUN], 0) == Match(length=5, tokens=[5, 6], foreign=True)


def test_short_runs_and_ends_are_not_found() -> None:
    store = store_of([7, *RUN], [2, 3, 4, 8], [4], [])
    for tokens in ([7, *RUN], [2, 3, 4], [1, 3, 4], [], [4]):
        assert store.match(tokens, 0) is None


def test_only_longer_runs_than_the_texts_own() -> None:
    store = store_of([6, *RUN, 5])
    assert store.match([6, *RUN], 4) is not None
    assert store.match([6, *RUN], 5) is None
    assert store_of([9] * 60).match([9] * 60, MAX_MATCH) is None


def test_the_longest_run_wins() -> None:
    store = store_of([7, *RUN, 5], [8, *RUN, 6], [8, *RUN, 6])
    assert following(store, [7, *RUN]) == [5]
    assert following(store, [9, *RUN]) == [6]


def test_most_texts_win_token_by_token_and_of_equally_many_the_latest() -> None:
    store = store_of([*RUN, 5, 5, 1], [*RUN, 5, 6, 2], [*RUN, 5, 6, 3], [*RUN, 9])
    assert following(store, RUN) == [5, 6, 3]
    assert following(store_of([*RUN, 5], [*RUN, 6]), RUN) == [6]
    assert following(store_of([*RUN, 5, 7], [*RUN, 5]), RUN) == [5, 7]
    assert following(store_of([*RUN, 5], [*RUN, 5]), RUN) == [5]


def test_runs_do_not_reach_from_text_to_text() -> None:
    store = store_of([9, 9, 9, 1, 2], [3, 4, 5, 6])
    assert store.match(RUN, 0) is None
    assert store.match([9, 1, 2, 3], 0) is None
    assert following(store_of([1, 2, 3, 4, 5], [6, 7, 8, 9, 1]), RUN) == [5]


def test_the_oldest_texts_go_first() -> None:
    texts = [[10 * i + j for j in range(6)] for i in range(5)]
    store = store_of(*texts, max_tokens=18)
    assert len(store) == 18
    found = [following(store, text[:5]) for text in texts]
    assert found == [[], [], [25], [35], [45]]
    store.add(list(range(100, 118)))
    assert [following(store, text[:5]) for text in texts] == [[]] * 5
    store.add(list(range(200, 240)))  # its end only
    assert (len(store), following(store, range(226, 230)), following(store, range(210, 220))) == (
        18,
        list(range(230, 240)),
        [],
    )
    assert len(store._ends) == 18 - LEAST_MATCH
    assert len(store._tokens) == 19


@pytest.mark.parametrize("seed", range(10))
def test_against_a_plain_search(seed: int) -> None:
    pick = random.Random(seed)
    store, texts = SuffixStore(80), list[list[int]]()
    for _ in range(60):
        text = [pick.randrange(2) for _ in range(pick.randrange(0, 30))]
        store.add(text)
        texts += [text] if len(text) > LEAST_MATCH else []
        while sum(map(len, texts)) > 80:
            texts.pop(0)
        assert len(store) == sum(map(len, texts))
        tokens = [pick.randrange(2) for _ in range(pick.randrange(1, 40))]
        assert store.match(tokens, 0) == search(texts, tokens)


def search(texts: Sequence[Sequence[int]], tokens: Sequence[int]) -> Match | None:
    """As `SuffixStore.match`, by looking at every place; of the latest 16 places."""
    places = [(text, end) for text in texts for end in range(LEAST_MATCH, len(text))]
    places = [(text, end) for text, end in places if list(text[end - 4 : end]) == list(tokens[-4:])][-16:]

    def common(text: Sequence[int], end: int) -> int:
        most = min(end, len(tokens), MAX_MATCH)
        return max(n for n in range(most + 1) if n == 0 or list(text[end - n : end]) == list(tokens[-n:]))

    if len(tokens) < LEAST_MATCH or not places:
        return None
    longest = max(common(*place) for place in places)
    parts = [list(text[end : end + MOST_FOLLOWING]) for text, end in places if common(text, end) == longest]
    following: list[int] = []
    while parts := [part for part in parts if len(part) > len(following)]:
        counts = Counter(part[len(following)] for part in parts)
        best = max(counts.values())
        token = next(part[len(following)] for part in parts[::-1] if counts[part[len(following)]] == best)
        parts = [part for part in parts if part[len(following)] == token]
        following.append(token)
    return Match(length=longest, tokens=following, foreign=True)


def test_a_row_takes_the_longer_match() -> None:
    config = GenerationConfig()
    prompt = (*RUN, 5, 9, 9, *RUN)
    request = Request(tokens=prompt, config=config, seed=0, max_new_tokens=9)
    row = Row(request=request, tokens=list(prompt), suffixes=SuffixStore())
    own = row.match()
    assert own is not None
    assert (own.length, own.foreign, own.continuation(2)) == (4, False, [5, 9])
    assert row.suffixes is not None
    row.suffixes.add([9, *RUN, 7])
    assert row.match() == Match(length=5, tokens=[7], foreign=True)
    row.append((8,))
    assert row.match() is None


def test_what_a_row_leaves() -> None:
    prompt = tuple(range(100))
    request = Request(tokens=prompt, config=GenerationConfig(), seed=0, max_new_tokens=9)
    row = Row(request=request, tokens=list(prompt))
    assert row.legacy == []
    row.append((7, 8))
    assert row.legacy == [*range(100 - MAX_MATCH, 100), 7, 8]
