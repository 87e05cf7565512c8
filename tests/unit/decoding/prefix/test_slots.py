"""Where rows lie in the cache: together by batch, each with its own keys and values, whoever comes and goes.

A token's keys and values are marked by its id, so that contents can be compared with tokens.
"""

import random
from collections.abc import Callable, Sequence

import pytest

from layerskip.decoding.batch import Batch
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.prefix.idle import LEAST_COPIED
from layerskip.decoding.prefix.slots import Slots
from layerskip.decoding.request import Request
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel

CAPACITY = 64
DEPTH = 5
BEGINNING = list(range(100, 100 + LEAST_COPIED))


class House:
    """`Slots` used as the engine uses it."""

    def __init__(self, lm: LanguageModel, max_rows: int, *, keeps_prefixes: bool, depths: Sequence[int] = (DEPTH,)):
        self.slots = Slots(lm.decoder, max_rows, CAPACITY, keeps_prefixes=keeps_prefixes)
        self.batches = [Batch(lm.decoder, number, "tokens", depth, None) for number, depth in enumerate(depths)]

    def add(self, tokens: Sequence[int], number: int = 0) -> tuple[Row, int]:
        """A row in a batch, read to its end, and how many of its tokens needn't be read."""
        request = Request(tokens=tuple(tokens), config=GenerationConfig(), seed=0, max_new_tokens=9)
        row = Row(request=request, tokens=list(tokens))
        self.slots.batches = self.present(number)
        common = self.slots.claim(row, self.batches[number])
        self.slots.settle()
        self.write(row)
        return row, common

    def write(self, row: Row, *more: int) -> None:
        """Extend a row, and mark all of its tokens but the last."""
        row.tokens += more
        cache, place = self.slots.cache, self.place(row)
        start, stop = cache.lengths[place], len(row.tokens) - 1
        for position in range(start, stop):
            cache.keys[:, place, position] = row.tokens[position]
            cache.values[:, place, position] = -row.tokens[position]
        cache.commit(place, max(0, stop - start))

    def leave(self, row: Row) -> None:
        self.slots.remove(row, self.batch_of(row))
        self.slots.settle()

    def move(self, row: Row, number: int) -> None:
        self.slots.batches = self.present(number)
        self.slots.move(row, self.batch_of(row), self.batches[number])
        self.slots.settle()

    def present(self, number: int) -> list[Batch]:
        """Batches with rows, and one that is about to get one."""
        return [batch for i, batch in enumerate(self.batches) if batch.rows or i == number]

    def place(self, row: Row) -> int:
        return self.slots._users.index(row)

    def batch_of(self, row: Row) -> Batch:
        return next(batch for batch in self.batches if row in batch.rows)

    def check(self) -> None:
        """Every row finds its own tokens in its batch's view, and idle rows hold what they are said to hold."""
        slots, cache, start = self.slots, self.slots.cache, 0
        for batch in self.batches:
            for place, row in enumerate(batch.rows):
                assert slots._users[start + place] is row
                assert batch.cache.lengths[place] == len(row.tokens) - 1
                self.check_contents(start + place, row.tokens[:-1])
                view = batch.cache.read(0, 0, len(row.tokens) - 1)[0]
                assert view[place, :, 0, 0].tolist() == row.tokens[:-1]
            if batch.rows:
                assert batch.cache.num_rows == len(batch.rows)
            start += len(batch.rows)
        assert all(user is None for user in slots._users[start:])
        for place in range(cache.num_rows):
            prefix = slots.prefixes.get(place)
            if prefix is not None:
                assert place >= start
                self.check_contents(place, prefix.tokens)

    def check_contents(self, place: int, tokens: Sequence[int]) -> None:
        cache, length = self.slots.cache, len(tokens)
        for sign, buffer in ((1, cache.keys), (-1, cache.values)):
            for layer in (0, -1):
                assert (sign * buffer[layer, place, :length, -1, -1]).tolist() == list(tokens)


@pytest.fixture
def house(text_lm: LanguageModel) -> Callable[..., House]:
    def make(max_rows: int, *, keeps_prefixes: bool = True, depths: Sequence[int] = (DEPTH,)) -> House:
        return House(text_lm, max_rows, keeps_prefixes=keeps_prefixes, depths=depths)

    return make


@pytest.mark.parametrize("keeps_prefixes", [False, True])
@pytest.mark.parametrize("leaving", [(0,), (3,), (1, 2), (0, 3), (0, 1, 2), (0, 1, 2, 3), ()])
def test_rows_go_and_the_others_stay_together(
    house: Callable[..., House], leaving: tuple[int, ...], keeps_prefixes: bool
) -> None:
    home = house(4, keeps_prefixes=keeps_prefixes)
    rows = [home.add([10 + i] * (i + 2))[0] for i in range(4)]
    for number in leaving:
        home.leave(rows[number])
        home.check()
    assert sorted(home.slots.rows, key=rows.index) == [row for i, row in enumerate(rows) if i not in leaving]
    assert len(home.slots.prefixes) == (len(leaving) if keeps_prefixes else 0)


def test_a_row_joins_a_batch_that_others_follow(house: Callable[..., House]) -> None:
    """One row of each batch behind it makes room; nobody else moves."""
    home = house(6, keeps_prefixes=False, depths=(DEPTH, DEPTH, DEPTH))
    rows = [home.add([10 * number + i] * 4, number)[0] for number in range(3) for i in range(2) if number + i < 3]
    before = {row: home.place(row) for row in rows}
    new, _ = home.add([77] * 6, 0)
    home.check()
    assert home.place(new) == 2
    moved = [row for row in rows if home.place(row) != before[row]]
    assert len(moved) == 2
    assert {home.batches.index(home.batch_of(row)) for row in moved} == {1, 2}


def test_a_row_moves_to_a_batch_before_its_own(house: Callable[..., House]) -> None:
    home = house(5, keeps_prefixes=False, depths=(DEPTH, DEPTH, DEPTH))
    for number, tokens in ((0, [1] * 3), (1, [2] * 4), (1, [3] * 5), (2, [4] * 6)):
        home.add(tokens, number)
    last, _ = home.add([5] * 7, 2)
    home.move(last, 0)
    home.check()
    assert [len(batch.rows) for batch in home.batches] == [2, 2, 1]
    assert home.place(last) == 1


@pytest.mark.parametrize("keeps_prefixes", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_contents_stay_right_whatever_happens(house: Callable[..., House], seed: int, keeps_prefixes: bool) -> None:
    pick = random.Random(seed)
    home = house(5, keeps_prefixes=keeps_prefixes, depths=(DEPTH, 3, DEPTH))
    reused = 0
    for _ in range(60):
        rows = home.slots.rows
        what = pick.random()
        if what < 0.4 and len(rows) < 5:
            start = pick.choice([[], BEGINNING, BEGINNING[:4], BEGINNING + [9] * 12])
            tokens = [*start, *(pick.randrange(50) for _ in range(pick.randrange(1, 6)))]
            _, common = home.add(tokens, pick.randrange(3))
            assert keeps_prefixes or common == 0
            reused += common > 0
        elif what < 0.6 and rows:
            home.leave(pick.choice(rows))
        elif what < 0.7 and home.batches[2].rows:
            home.move(pick.choice(home.batches[2].rows), 0)
        elif what < 0.8 and rows and len(rows[-1].output) > 1:  # a round was cut short
            rows[-1].cut(len(rows[-1].output) - 1)
            home.slots.forget_from(rows[-1], len(rows[-1].tokens) - 1)
        elif rows and len(rows[-1].tokens) < CAPACITY - 3:
            home.write(rows[-1], 60, 61, 62)
        home.check()
    assert (reused > 3) == keeps_prefixes


def test_a_row_goes_on_where_another_has_ended(house: Callable[..., House]) -> None:
    """Without a copy: the prefix isn't there for others any more."""
    home = house(3)
    first, common = home.add([1, 2, 3, 4, 5])
    assert common == 0
    home.leave(first)
    again, common = home.add([1, 2, 3, 4, 9, 9])
    assert common == 4  # the last token of the first row had no keys and values
    assert len(home.slots.prefixes) == 0
    home.check()
    home.leave(again)
    assert home.add([1, 2, 3, 4, 9, 9])[1] == 5  # the last token is always run again


def test_a_beginning_that_others_may_want_is_copied(house: Callable[..., House]) -> None:
    """Where the prefix goes on for longer than what is wanted of it."""
    home = house(3)
    long, _ = home.add(BEGINNING + [1] * (LEAST_COPIED + 2))
    home.leave(long)
    short, common = home.add([*BEGINNING, 7, 8])
    assert common == LEAST_COPIED
    assert len(home.slots.prefixes) == 1  # still all of the long one
    home.check()
    assert home.add(BEGINNING + [1] * LEAST_COPIED)[1] == 2 * LEAST_COPIED - 1
    assert home.batch_of(short).num_rows == 2
    home.check()


def test_a_beginning_is_never_copied_onto_itself(house: Callable[..., House]) -> None:
    """Even where the row that holds it is the least recently used one: another one makes room."""
    home = house(2)
    long, _ = home.add(BEGINNING + [1] * (LEAST_COPIED + 2))
    other, _ = home.add([7, 7, 7])
    home.leave(long)
    home.leave(other)
    assert home.add([*BEGINNING, 7, 8])[1] == LEAST_COPIED
    assert home.slots.prefixes.match(long.tokens, DEPTH, {})[1] == len(long.tokens) - 1
    home.check()


def test_a_short_beginning_is_read_again_rather_than_copied(house: Callable[..., House]) -> None:
    home = house(3)
    long, _ = home.add(BEGINNING + [1] * LEAST_COPIED)
    home.leave(long)
    assert home.add([*BEGINNING[:-1], 7, 8])[1] == 0
    assert len(home.slots.prefixes) == 1
    home.check()


def test_the_last_idle_row_is_taken_over_for_any_beginning(house: Callable[..., House]) -> None:
    home = house(2)
    long, _ = home.add(BEGINNING + [1] * LEAST_COPIED)
    home.add([9, 9])
    home.leave(long)
    assert home.add([*BEGINNING[:2], 7, 8])[1] == 2
    assert len(home.slots.prefixes) == 0
    home.check()


def test_a_running_row_lends_its_beginning(house: Callable[..., House]) -> None:
    home = house(3)
    home.add([*BEGINNING, 1, 2, 3])
    assert home.add([*BEGINNING, 4, 5])[1] == LEAST_COPIED
    assert home.add([*BEGINNING[:-1], 6])[1] == 0  # too short to be copied
    home.check()


def test_the_least_recently_used_row_goes_first(house: Callable[..., House]) -> None:
    home = house(3)
    rows = [home.add([10 * i + j for j in range(6)])[0] for i in range(1, 4)]
    for row in (rows[1], rows[0], rows[2]):
        home.leave(row)
    home.leave(home.add([20, 21, 22, 23, 24, 25, 0])[0])  # the second one is used again
    new, common = home.add([90, 91, 92])
    assert common == 0
    home.check()
    home.leave(new)
    found = {first: home.slots.prefixes.match([first], DEPTH, {})[1] for first in (10, 20, 30, 90)}
    assert found == {10: 0, 20: 1, 30: 1, 90: 1}


@pytest.mark.parametrize(("had", "wanted", "common"), [(3, DEPTH, 0), (DEPTH, 3, 4), (3, 3, 4)])
def test_keys_of_enough_layers_only(house: Callable[..., House], had: int, wanted: int, common: int) -> None:
    home = house(3, depths=(had, wanted))
    first, _ = home.add([1, 2, 3, 4, 5], 0)
    home.leave(first)
    assert home.add([1, 2, 3, 4, 9], 1)[1] == common
    home.check()


def test_nothing_is_kept_unless_asked_for(house: Callable[..., House]) -> None:
    home = house(3, keeps_prefixes=False)
    home.add(BEGINNING * 2)
    home.leave(home.add([1, 2, 3, 4, 5])[0])
    assert home.add([1, 2, 3, 4, 5])[1] == 0
    assert home.add(BEGINNING * 2)[1] == 0
    assert len(home.slots.prefixes) == 0


def test_a_larger_cache_holds_what_the_smaller_one_held(house: Callable[..., House]) -> None:
    home = house(2)
    first, _ = home.add([1, 2, 3, 4])
    second, _ = home.add([5, 6, 7])
    home.leave(first)
    cache = home.slots.cache
    home.slots.grow(2, CAPACITY)
    assert home.slots.cache is cache  # large enough
    home.slots.grow(4, 1)
    assert (home.slots.cache.num_rows, home.slots.cache.capacity) == (4, CAPACITY)
    home.check()
    home.slots.grow(1, 2 * CAPACITY)
    assert (home.slots.cache.num_rows, home.slots.cache.capacity) == (4, 2 * CAPACITY)
    home.check()
    assert home.add([1, 2, 3, 9])[1] == 3
    home.write(second, *[8] * CAPACITY)
    home.check()
