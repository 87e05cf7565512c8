"""Blocks found by a chain of hashes: against a model that remembers every sequence as it is."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerskip.decoding.prefix.chains import NOBODY, BlockChains, chain_hash

SIZE = 2
HASHES = {
    "real": chain_hash,
    "always 0": lambda parent, tokens: 0,
    "three values": lambda parent, tokens: sum(tokens) % 3,
}


def put(chains: BlockChains, tokens: Sequence[int]) -> list[int]:
    """Keep a sequence as `BlockPool` does; numbers of its blocks."""
    chain = chains.find(tokens)
    size = chains.block_tokens
    for start in range(len(chain) * size, len(tokens) - size + 1, size):
        number = chains.spare(chain)
        if number is None:
            break
        chains.add(number, chain[-1] if chain else NOBODY, tokens[start : start + size])
        chain.append(number)
    chains.use(chain)
    return chain


class Model(RuleBasedStateMachine):
    """Prefixes of whole blocks, each with the time of its last use; the oldest without a longer one goes first."""

    @initialize(num_blocks=st.integers(1, 7), name=st.sampled_from(sorted(HASHES)))
    def begin(self, num_blocks: int, name: str) -> None:
        self.chains = BlockChains(num_blocks, SIZE, hash_=HASHES[name])
        self.num_blocks = num_blocks
        self.used: dict[tuple[int, ...], int] = {}
        self.contents: dict[int, tuple[int, ...]] = {}
        """By number of a block, all tokens up to its end: what a pool would hold of keys and values."""
        self.clock = 0

    def known(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        prefixes = [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]
        found = next((i for i, prefix in enumerate(prefixes) if prefix not in self.used), len(prefixes))
        return prefixes[:found]

    def touch(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        for prefix in reversed(prefixes):
            self.clock += 1
            self.used[prefix] = self.clock

    @rule(tokens=st.lists(st.integers(0, 1), max_size=11))
    def find(self, tokens: list[int]) -> None:
        chain, known = self.chains.find(tokens), self.known(tokens)
        assert [self.contents[number] for number in chain] == known
        self.touch(known)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=13))
    def keep(self, tokens: list[int]) -> None:
        own = self.known(tokens)
        self.touch(own)
        for end in range(SIZE * (len(own) + 1), len(tokens) + 1, SIZE):
            if len(self.used) == self.num_blocks:
                others = [prefix for prefix in self.used if prefix not in own]
                if not others:
                    break
                del self.used[min(others, key=self.used.__getitem__)]
            own.append(tuple(tokens[:end]))
            self.used[own[-1]] = -1
        self.touch(own)
        chain = put(self.chains, tokens)
        for number, prefix in zip(chain, own, strict=True):
            self.contents[number] = prefix

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def find_what_is_kept(self, data: st.DataObject) -> None:
        tokens = data.draw(st.sampled_from(sorted(self.used)))
        assert self.contents[self.chains.find(tokens)[-1]] == tokens
        self.touch(self.known(tokens))

    @invariant()
    def same_blocks(self) -> None:
        assert len(self.chains) == len(self.used) <= self.num_blocks
        numbers = [*self.chains._blocks]
        assert {self.contents[number] for number in numbers} == set(self.used)
        assert sorted([*numbers, *self.chains._free]) == list(range(self.num_blocks))
        for place, number in enumerate(numbers):  # a block stands before its parent
            parent = self.chains._blocks[number].parent
            assert parent == NOBODY or numbers.index(parent) > place
        assert sum(map(len, self.chains._by_hash.values())) == len(numbers)


Model.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


@pytest.mark.parametrize("name", HASHES)
def test_equal_hashes_are_told_apart(name: str) -> None:
    chains = BlockChains(20, SIZE, hash_=HASHES[name])
    first, second = put(chains, [1, 2, 3, 4, 5, 6]), put(chains, [2, 1, 3, 4, 5, 6])
    assert len({*first, *second}) == 6  # the same tokens behind other ones are other blocks
    assert chains.find([1, 2, 3, 4, 9, 9]) == first[:2]
    assert chains.find([2, 1, 3, 4, 5, 6, 7]) == second
    assert chains.find([3, 4]) == []
    assert chains.find([1]) == []


def test_a_chain_longer_than_the_pool_keeps_its_beginning() -> None:
    chains = BlockChains(3, SIZE)
    put(chains, [7, 7])
    assert len(put(chains, list(range(20)))) == 3
    assert len(chains.find(list(range(20)))) == 3
    assert chains.find([7, 7]) == []


def test_an_interrupted_chain_leaves_no_parent_to_go_first() -> None:
    chains = BlockChains(2, SIZE)
    first = chains.spare(())
    assert first is not None
    chains.add(first, NOBODY, [1, 2])
    second = chains.spare([first])
    assert second is not None
    chains.add(second, first, [3, 4])  # nobody says that the chain is used
    assert chains.spare(()) == second
    assert chains.find([1, 2, 3, 4]) == [first]


def test_roots_differ_from_pool_to_pool() -> None:
    """So that prompts whose hashes collide can't be made without knowing the process."""
    hashes = set()
    for _ in range(4):
        chains = BlockChains(1, SIZE)
        put(chains, [1, 2])
        hashes |= set(chains._by_hash)
    assert len(hashes) == 4
