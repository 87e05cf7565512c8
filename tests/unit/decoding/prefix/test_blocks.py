"""Keys and values in blocks: what is copied, what is counted, and what is refused.

A token's keys and values are marked by its id and its place, so that contents can be compared with tokens.
"""

import random
from collections.abc import Sequence

import pytest
import torch

from layerskip.decoding.prefix.blocks import BlockPool, PrefixBlocks
from layerskip.decoding.prefix.chains import ChainHash, chain_hash
from layerskip.decoding.prefix.slots import Slots
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache

CAPACITY = 40
SIZE = 4


@pytest.fixture
def cache(text_lm: LanguageModel) -> KVCache:
    return text_lm.decoder.new_cache(3, CAPACITY)


def block_bytes(cache: KVCache, size: int = SIZE) -> int:
    return 2 * cache.keys[:, 0, :size].numel() * cache.keys.itemsize


def make_pool(cache: KVCache, num_blocks: int, hash_: ChainHash = chain_hash) -> BlockPool:
    # Not a whole number of blocks: what is over isn't used.
    config = PrefixBlocks(max_bytes=num_blocks * block_bytes(cache) + block_bytes(cache) // 2, block_tokens=SIZE)
    return BlockPool(cache, config, hash_=hash_)


def write(cache: KVCache, place: int, tokens: Sequence[int]) -> None:
    """Let a row hold tokens, and something else behind them."""
    cache.keys[:, place], cache.values[:, place] = 1000.0, 1000.0
    layers = torch.arange(cache.keys.shape[0]).view(-1, 1, 1)
    for position, token in enumerate(tokens):
        cache.keys[:, place, position] = token + position / 64 + layers / 1024
        cache.values[:, place, position] = -token - position / 64 - layers / 1024
    cache.rollback(place, 0)
    cache.commit(place, len(tokens))


def check(cache: KVCache, place: int, tokens: Sequence[int]) -> None:
    """A row holds these tokens."""
    assert cache.lengths[place] == len(tokens)
    layers = torch.arange(cache.keys.shape[0]).view(-1, 1, 1).expand_as(cache.keys[:, 0, 0])
    for position, token in enumerate(tokens):
        assert torch.equal(cache.keys[:, place, position], token + position / 64 + layers / 1024)
        assert torch.equal(cache.values[:, place, position], -token - position / 64 - layers / 1024)


def test_whole_blocks_are_copied(cache: KVCache) -> None:
    pool = make_pool(cache, 8)
    tokens = list(range(10))
    write(cache, 0, tokens)
    pool.keep(tokens, cache, 0)
    assert pool.counts.usage == 2 / 8
    write(cache, 0, [9] * 12)
    write(cache, 2, [9] * 12)
    cache.rollback(2, 0)
    assert pool.fetch([*tokens, 7], cache, 2) == 8
    check(cache, 2, tokens[:8])
    assert torch.equal(cache.keys[:, 2, 8:], torch.cat((cache.keys[:, 0, 8:12], cache.keys[:, 2, 12:]), 1))
    check(cache, 0, [9] * 12)


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_token_is_always_run(cache: KVCache, length: int, found: int) -> None:
    pool = make_pool(cache, 8)
    tokens = list(range(8))
    write(cache, 0, tokens)
    pool.keep(tokens, cache, 0)
    assert pool.fetch([*tokens, 8, 9, 10, 11][:length], cache, 1) == found
    check(cache, 1, tokens[:found])


def test_a_row_that_waits_gets_what_comes_meanwhile(cache: KVCache) -> None:
    pool, tokens = make_pool(cache, 4), list(range(14))
    write(cache, 0, tokens)
    pool.keep(tokens[:4], cache, 0)
    assert pool.fetch(tokens, cache, 1) == 4
    assert pool.fetch(tokens, cache, 1) == 4
    pool.keep(tokens, cache, 0)
    assert pool.fetch(tokens, cache, 1) == 12
    check(cache, 1, tokens[:12])
    others = [50] * 16
    write(cache, 0, others)
    pool.keep(others, cache, 0)  # throws all of it out, but the row has its copy
    assert pool.fetch(tokens, cache, 1) == 12
    check(cache, 1, tokens[:12])


@pytest.mark.parametrize("hash_", [chain_hash, lambda parent, tokens: 0])
@pytest.mark.parametrize("seed", range(8))
def test_contents_stay_right_under_pressure(cache: KVCache, hash_: ChainHash, seed: int) -> None:
    pick, pool = random.Random(seed), make_pool(cache, 5, hash_)
    found = 0
    for _ in range(120):
        tokens = [pick.randrange(3)] * pick.randrange(4, 9) + [pick.randrange(2)] * 9
        place = pick.randrange(3)
        if pick.random() < 0.5:
            write(cache, place, tokens)
            pool.keep(tokens, cache, place)
        else:
            cache.rollback(place, 0)
            length = pool.fetch(tokens, cache, place)
            check(cache, place, tokens[:length])
            found += length
        assert 0 < pool.counts.usage <= 1 or not found
    assert found > 100
    assert pool.counts.usage == 1


def test_what_is_counted(cache: KVCache) -> None:
    pool = make_pool(cache, 4)
    assert (pool.counts.queries, pool.counts.hits, pool.counts.usage) == (0, 0, 0.0)
    pool.count(10, 4)
    pool.count(3, 0)
    assert (pool.counts.queries, pool.counts.hits) == (13, 4)


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_bytes_are_a_bound(cache: KVCache, block_tokens: int) -> None:
    size = block_bytes(cache, block_tokens)
    for max_bytes, num_blocks in ((size, 1), (5 * size - 1, 4), (5 * size, 5)):
        pool = BlockPool(cache, PrefixBlocks(max_bytes=max_bytes, block_tokens=block_tokens))
        assert pool.num_blocks == num_blocks
        assert pool._parts[0].nbytes + pool._parts[1].nbytes == num_blocks * size
    with pytest.raises(InvalidArgumentError, match=f"a block of {block_tokens} tokens takes {size} bytes"):
        BlockPool(cache, PrefixBlocks(max_bytes=size - 1, block_tokens=block_tokens))


def test_more_memory_than_there_is_is_refused(cache: KVCache) -> None:
    with pytest.raises(OutOfMemoryError, match=r"blocks of 1048576\.00 GiB can't be reserved.*smaller max_bytes"):
        BlockPool(cache, PrefixBlocks(max_bytes=2**50))


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 10, "block_tokens": 0}, {"max_bytes": 1.5}])
def test_settings_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"(max_bytes|block_tokens) must be a whole number"):
        PrefixBlocks(**options)


def test_prefixes_are_kept_in_one_way(text_lm: LanguageModel) -> None:
    with pytest.raises(InvalidArgumentError, match="give keeps_prefixes or prefix_blocks"):
        Slots(text_lm.decoder, 2, 8, keeps_prefixes=True, prefix_blocks=PrefixBlocks(max_bytes=10**6))
