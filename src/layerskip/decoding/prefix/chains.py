"""Which blocks of tokens a pool holds, found by a chain of hashes, and which of them goes first.

A block is `block_tokens` tokens of a sequence, and all that stands before them: its parent is the block before it. It
is found by the hash of its parent's hash and its own tokens. Hashes only narrow the search: tokens and parent are
compared too, so that blocks of equal hash are never taken for each other.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

ChainHash = Callable[[int, tuple[int, ...]], int]
"""The hash of a block from its parent's hash and its tokens."""

NOBODY = -1
"""The parent of a sequence's first block."""


def chain_hash(parent: int, tokens: tuple[int, ...]) -> int:
    """The hash of a block from its parent's hash and its tokens."""
    return hash((parent, tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    parent: int
    """Number of the block before it."""
    tokens: tuple[int, ...]
    hash: int


class BlockChains:
    """The blocks of a pool by their tokens; numbers only, no tensors."""

    def __init__(self, num_blocks: int, block_tokens: int, *, hash_: ChainHash = chain_hash) -> None:
        """Begin empty.

        Args:
            num_blocks: Blocks that the pool can hold.
            block_tokens: Tokens of a block.
            hash_: Finds blocks. Any function is correct; one whose values collide is slow.
        """
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._hash = hash_
        self._root = secrets.randbits(60)  # so that nobody can choose prompts whose hashes collide
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        """By number, least recently used first. A block stands before its parent: the first one never has children."""
        self._by_hash: dict[int, list[int]] = {}
        self._free = list(range(num_blocks - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The longest chain of blocks that some tokens begin with; it counts as used.

        Returns:
            Numbers of the blocks, in the order of their tokens.
        """
        chain: list[int] = []
        size, parent, key = self.block_tokens, NOBODY, self._root
        for start in range(0, len(tokens) - size + 1, size):
            part = tuple(tokens[start : start + size])
            key = self._hash(key, part)
            block = self._find_one(key, parent, part)
            if block is None:
                break
            chain.append(block)
            parent = block
        self.use(chain)
        return chain

    def use(self, chain: Sequence[int]) -> None:
        """Note that a chain from a sequence's first block on is in use now."""
        for number in reversed(chain):
            self._blocks.move_to_end(number)

    def spare(self, in_use: Collection[int]) -> int | None:
        """A block to write to: a free one, or else the least recently used one, which is forgotten.

        Args:
            in_use: Blocks that must stay; with each of them, those before it.

        Returns:
            The block's number, whose contents may be written before `add` makes it known; None if all are in use.
        """
        if not self._free:
            oldest = next((number for number in self._blocks if number not in in_use), None)
            if oldest is None:
                return None
            self._forget(oldest)
        return self._free[-1]

    def add(self, number: int, parent: int, tokens: Sequence[int]) -> None:
        """Make a block known whose contents are written. Until it is used, it is the first that goes.

        Args:
            number: What `spare` gave last.
            parent: Number of the block before it, or `NOBODY`.
            tokens: Its tokens.
        """
        assert self._free[-1] == number
        self._free.pop()
        part = tuple(tokens)
        key = self._hash(self._root if parent == NOBODY else self._blocks[parent].hash, part)
        self._blocks[number] = _Block(parent=parent, tokens=part, hash=key)
        self._blocks.move_to_end(number, last=False)  # before its parent, whatever interrupts the caller
        self._by_hash.setdefault(key, []).append(number)

    def _find_one(self, key: int, parent: int, tokens: tuple[int, ...]) -> int | None:
        for number in self._by_hash.get(key, ()):
            block = self._blocks[number]
            if block.parent == parent and block.tokens == tokens:
                return number
        return None

    def _forget(self, number: int) -> None:
        block = self._blocks.pop(number)
        others = self._by_hash[block.hash]
        others.remove(number)
        if not others:
            del self._by_hash[block.hash]
        self._free.append(number)
