"""How much of the memory keys and values get, and how many texts of which length fit into that."""

from dataclasses import dataclass

from layerskip.decoding.prefix.blocks import BLOCK_TOKENS
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.decoder import Decoder
from layerskip.serving.config import ServerConfig

GIBIBYTE = 2**30
SHARE_CPU, SHARE_GPU = 0.25, 0.8
"""Share of the free memory that is taken where nobody says how much."""
PREFIX_SHARE = 0.2
"""Share of it that is left for prefixes of earlier requests, where only the length of texts is open."""
LEAST_BLOCKS = 4
"""Blocks of prefixes that are worth having."""
LEAST_TOKENS = 256
"""Tokens of a text below which a server is of no use: more rows than fit at this length are not made."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Sizes of the engine's cache."""

    rows: int
    """Texts that run at once."""
    capacity: int
    """Tokens that each may have, prompt included."""
    bytes: int
    """Bytes of their keys and values."""
    prefix_bytes: int
    """Bytes of those that are kept of earlier requests, for requests that begin alike; 0: none."""


def plan_cache(decoder: Decoder, config: ServerConfig) -> CachePlan:
    """Sizes that fit into the memory.

    A length that was asked for is kept, and so is a number of rows; where only the length is open, it is what fits.

    Raises:
        InvalidArgumentError: The length is more than the model's context.
        OutOfMemoryError: Rows of that length don't fit.
    """
    longest = decoder.max_context
    if config.max_model_len is not None and config.max_model_len > longest:
        raise InvalidArgumentError(
            f"max_model_len {config.max_model_len} is more than the model's context of {longest} tokens"
        )
    budget = _budget(decoder, config)
    each = decoder.cache_bytes(1, 1) // 2  # a row has one slot more than its tokens
    fitting = int(budget // (each * config.max_concurrency)) - 1
    shared = int((1 - PREFIX_SHARE) * budget // (each * config.max_concurrency)) - 1
    capacity = config.max_model_len or min(longest, max(shared, min(fitting, LEAST_TOKENS), 0))
    wanted = config.max_model_len or min(LEAST_TOKENS, longest)
    if capacity > fitting or capacity < wanted:
        needed = decoder.cache_bytes(config.max_concurrency, wanted)
        raise OutOfMemoryError(
            f"{config.max_concurrency} texts of {wanted} tokens need {needed / GIBIBYTE:.2f} GiB for keys and values, "
            f"and {budget / GIBIBYTE:.2f} GiB are allowed; give more --cache-memory, or fewer or shorter texts "
            "(--max-concurrency, --max-model-len)"
        )
    rows = config.max_concurrency
    taken = decoder.cache_bytes(rows, capacity)
    rest = int(budget) - taken
    # Nobody has said how much: no more is kept than a round of other requests, as memory is really taken.
    prefix = rest if config.cache_memory is not None else min(rest, taken)
    return CachePlan(
        rows=rows,
        capacity=capacity,
        bytes=taken,
        prefix_bytes=prefix if prefix >= LEAST_BLOCKS * BLOCK_TOKENS * each else 0,
    )


def _budget(decoder: Decoder, config: ServerConfig) -> float:
    """Bytes for keys and values."""
    if config.cache_memory is not None:
        return config.cache_memory * GIBIBYTE
    free = free_memory(decoder.device)
    if free is None:  # the system doesn't tell: the cache itself says whether it fits
        return float(decoder.cache_bytes(config.max_concurrency, config.max_model_len or decoder.max_context) + 1)
    return free * (SHARE_CPU if decoder.device.type == "cpu" else SHARE_GPU)
