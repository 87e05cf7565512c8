"""Keys and values of verified tokens in blocks, apart from the rows: a request that begins alike copies them.

Shapes: N blocks of P tokens, L layers, exit adapters included, H_kv key/value heads, D_head channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.checks import whole_number
from layerskip.decoding.prefix.chains import NOBODY, BlockChains, ChainHash, chain_hash
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.cache import KVCache

BLOCK_TOKENS = 16
"""Tokens of a block: of a common beginning, up to so many less one are read again."""


@dataclass(frozen=True, kw_only=True)
class PrefixBlocks:
    """How much is kept in blocks."""

    max_bytes: int
    """Bytes of memory, reserved at start; under tensor parallelism those of each process."""
    block_tokens: int = BLOCK_TOKENS
    """P."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InvalidArgumentError: A number is below 1.
        """
        whole_number("max_bytes", self.max_bytes, least=1)
        whole_number("block_tokens", self.block_tokens, least=1)


@dataclass(frozen=True, kw_only=True)
class PrefixCounts:
    """How much of the prompts was found."""

    queries: int = 0
    """Tokens of prompts that were looked up and then read."""
    hits: int = 0
    """Those whose keys and values were found."""
    usage: float = 0.0
    """Share of the blocks that hold something, from 0 to 1."""


class BlockPool:
    """Blocks [N, L, P, H_kv, D_head] for the keys, as many for the values, and some for scales where there are any."""

    def __init__(self, cache: KVCache, config: PrefixBlocks, *, hash_: ChainHash = chain_hash) -> None:
        """Reserve the memory.

        Args:
            cache: The rows that blocks are copied from and to.
            config: How much to reserve.
            hash_: Finds blocks.

        Raises:
            InvalidArgumentError: Not even one block fits into `max_bytes`.
            OutOfMemoryError: There is less free memory than `max_bytes`.
        """
        shapes = [torch.Size((len(part), config.block_tokens, *part.shape[3:])) for part in cache.buffers]
        sizes = [shape.numel() * part.itemsize for shape, part in zip(shapes, cache.buffers, strict=True)]
        block_bytes = sum(sizes)
        num_blocks = config.max_bytes // block_bytes
        if num_blocks < 1:
            raise InvalidArgumentError(
                f"a block of {config.block_tokens} tokens takes {block_bytes} bytes, and max_bytes is "
                f"{config.max_bytes}; allow more, or use smaller blocks"
            )
        device, needed = cache.keys.device, num_blocks * block_bytes
        free = free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemoryError(_memory_message(needed, free))
        try:
            self._parts = [
                torch.zeros((num_blocks, *shape), dtype=part.dtype, device=device)
                for shape, part in zip(shapes, cache.buffers, strict=True)
            ]
        except RuntimeError as error:  # torch reports an allocation that failed so, on CPU and CUDA alike
            raise OutOfMemoryError(_memory_message(needed, free)) from error
        self._chains = BlockChains(num_blocks, config.block_tokens, hash_=hash_)
        self._queries = self._hits = 0

    def clear(self) -> None:
        """Write to all of the memory; nothing may be in it."""
        assert len(self._chains) == 0
        for part in self._parts:
            part.zero_()

    @property
    def num_blocks(self) -> int:
        """N."""
        return self._chains.num_blocks

    @property
    def block_tokens(self) -> int:
        """P."""
        return self._chains.block_tokens

    @property
    def counts(self) -> PrefixCounts:
        """What was looked up and found so far, and how full the pool is."""
        usage = len(self._chains) / self._chains.num_blocks
        return PrefixCounts(queries=self._queries, hits=self._hits, usage=usage)

    @torch.inference_mode()
    def fetch(self, tokens: Sequence[int], cache: KVCache, place: int) -> int:
        """Begin a row with the longest known beginning of a prompt.

        Args:
            tokens: The prompt; its last token is never taken, as it has to be run.
            cache: The rows.
            place: The row; it holds nothing, or what was fetched before.

        Returns:
            Tokens whose keys and values the row has now.
        """
        chain, size = self._chains.find(tokens[:-1]), self._chains.block_tokens
        found, held = len(chain) * size, cache.lengths[place]
        for number, block in enumerate(chain[held // size :], start=held // size):
            for kept, part in zip(self._parts, _parts(cache, place, number * size, size), strict=True):
                part.copy_(kept[block])
        cache.commit(place, max(0, found - held))  # nothing new where blocks were thrown out meanwhile
        return max(found, held)

    def count(self, queries: int, hits: int) -> None:
        """Count a prompt that has been read.

        Args:
            queries: Its tokens.
            hits: Those that were found.
        """
        self._queries += queries
        self._hits += hits

    @torch.inference_mode()
    def keep(self, tokens: Sequence[int], cache: KVCache, place: int) -> None:
        """Keep the full blocks of a row that aren't known yet, as far as there is room beside those before them.

        Args:
            tokens: Tokens that all layers have run over, and whose keys and values the row holds.
            cache: The rows.
            place: The row.
        """
        chains, size = self._chains, self._chains.block_tokens
        chain = chains.find(tokens)
        in_use = set(chain)
        try:
            for start in range(len(chain) * size, len(tokens) - size + 1, size):
                block = chains.spare(in_use)
                if block is None:
                    break
                for kept, part in zip(self._parts, _parts(cache, place, start, size), strict=True):
                    kept[block].copy_(part)
                chains.add(block, chain[-1] if chain else NOBODY, tokens[start : start + size])
                chain.append(block)
                in_use.add(block)
        finally:
            chains.use(chain)


def _parts(cache: KVCache, place: int, start: int, size: int) -> list[Tensor]:
    """What the cache's buffers hold of some tokens of a row: keys and values [L, P, H_kv, D_head], perhaps scales."""
    return [buffer[:, place, start : start + size] for buffer in cache.buffers]


def _memory_message(needed: int, free: int | None) -> str:
    available = "" if free is None else f", and {free / 2**30:.2f} GiB are free"
    return f"blocks of {needed / 2**30:.2f} GiB can't be reserved{available}; use a smaller max_bytes"
