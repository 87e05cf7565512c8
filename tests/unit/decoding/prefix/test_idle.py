"""What idle rows hold, and which of it is used first."""

import random

import pytest

from layerskip.decoding.prefix.idle import IdlePrefixes, Prefix, common_length


def prefix(*tokens: int, num_layers: int = 4) -> Prefix:
    return Prefix(tokens=tokens, num_layers=num_layers)


@pytest.fixture
def store() -> IdlePrefixes:
    """Rows 0, 1 and 3 are idle, in the order 3, 0, 1 from the least recently used one on."""
    store = IdlePrefixes()
    store.put(3, prefix(1, 2, 3))
    store.put(0, prefix(1, 2, 3, 4, 5))
    store.put(1, prefix(7, 8, 9))
    return store


def test_the_longest_common_beginning_wins(store: IdlePrefixes) -> None:
    assert store.match([1, 2, 3, 4, 9], 4, {}) == (0, 4)
    assert store.match([7, 8], 4, {}) == (1, 2)
    assert store.match([1, 2, 3], 4, {})[1] == 3
    assert store.match([9, 8, 7], 4, {}) == (-1, 0)
    assert store.match([], 4, {}) == (-1, 0)


def test_running_rows_match_too(store: IdlePrefixes) -> None:
    running = {2: prefix(1, 2, 3, 4, 5, 6), 4: prefix(1)}
    assert store.match([1, 2, 3, 4, 5, 6, 7], 4, running) == (2, 6)
    assert store.match([1, 2, 3, 4, 5], 4, running) == (0, 5)  # of equal ones the idle row
    assert store.match([7, 8, 9], 4, running) == (1, 3)


@pytest.mark.parametrize(("needed", "found"), [(2, (2, 4)), (3, (5, 3)), (4, (1, 2)), (5, (-1, 0))])
def test_only_prefixes_with_enough_layers_count(needed: int, found: tuple[int, int]) -> None:
    store = IdlePrefixes()
    store.put(2, prefix(1, 2, 3, 4, num_layers=2))
    store.put(1, prefix(1, 2, num_layers=4))
    assert store.match([1, 2, 3, 4], needed, {5: prefix(1, 2, 3, num_layers=3)}) == found


def test_rows_that_hold_nothing_go_first_and_then_the_least_recently_used(store: IdlePrefixes) -> None:
    assert store.oldest([0, 1, 2, 3]) == 2
    assert store.oldest([0, 1, 3]) == 3
    assert store.oldest([1, 0]) == 0
    assert store.oldest([1]) == 1
    store.put(3, prefix(5))  # used again
    assert store.oldest([0, 1, 3]) == 0
    store.remove(0)
    assert store.oldest([0, 1, 3]) == 0  # holds nothing any more


def test_what_is_put_and_removed(store: IdlePrefixes) -> None:
    assert len(store) == 3
    store.put(1, prefix(4))
    assert len(store) == 3
    assert store.get(1) == prefix(4)
    store.remove(1)
    store.remove(1)
    assert (len(store), store.get(1), store.get(2)) == (2, None, None)


def test_contents_that_are_exchanged_keep_their_age(store: IdlePrefixes) -> None:
    store.swap(3, 1)
    assert (store.get(1), store.get(3)) == (prefix(1, 2, 3), prefix(7, 8, 9))
    assert [store.oldest(places) for places in ([0, 1, 3], [0, 3])] == [1, 0]
    store.swap(0, 5)  # with a row that holds nothing
    assert (store.get(0), store.get(5)) == (None, prefix(1, 2, 3, 4, 5))
    assert len(store) == 3


def test_common_lengths_against_a_plain_search() -> None:
    pick = random.Random(0)
    for _ in range(500):
        tokens, others = ([pick.randrange(2) for _ in range(pick.randrange(9))] for _ in range(2))
        others = tokens[: pick.randrange(9)] + others
        pairs = zip(tokens, others, strict=False)
        plain = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))
        assert common_length(tokens, others) == common_length(tuple(others), tokens) == plain
