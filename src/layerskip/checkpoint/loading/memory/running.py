"""Bytes that running a network needs: the cache, and what lives while a chunk of a prompt is read.

Shapes: B rows, Q tokens of a chunk, T tokens of a sequence, D width, H query heads, H_kv key/value heads, D_head
channels of a head, I width of the MLP, V vocabulary.
"""

import torch

from layerskip.model import cache
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.native.library import GROUP
from layerskip.model.native.threads import kernel_threads

NATIVE_BLOCK = 96
"""Tokens that go through native layers together (`kChunk` of native/pass.cpp)."""
NATIVE_RESULTS = 2**20
"""Numbers of attention over parts of a text (`kKept` of native/kernels/attention.h)."""
NATIVE_TILE = 144
"""Channels of heads that each thread has in floats at a time (`member_floats` of native/kernels/attention.cpp)."""
FLOAT_BYTES = 4
CHUNK = 1024
"""Tokens of a prompt that are read at once (`PREFILL_CHUNK` of decoding/rounds/plain.py)."""


def cache_bytes(config: ModelConfig, kept: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of a `KVCache` of B rows of T tokens in a dtype; one more slot of each row is scratch."""
    return cache.cache_bytes(config, rows, tokens, kept)


def working_bytes(config: ModelConfig, dtype: torch.dtype, *, native: bool, rows: int, chunk: int, tokens: int) -> int:
    """Bytes of hidden states, masks and logits at the worst moment of reading a prompt's last chunk.

    Args:
        config: Sizes and switches.
        dtype: Of hidden states.
        native: Whether compiled kernels run the layers.
        rows: B.
        chunk: Q.
        tokens: T, committed tokens and the chunk's own.
    """
    block, logits = rows * chunk, rows * config.vocab_size * FLOAT_BYTES
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if native:
        room = query + 2 * key + query + 3 * config.intermediate_size + 2 * config.hidden_size
        prepared = 2 * (max(config.hidden_size, config.intermediate_size, query) + GROUP)  # `most_prepared_bytes`
        tiles = kernel_threads() * NATIVE_TILE * config.head_dim
        work = NATIVE_RESULTS + tiles + NATIVE_BLOCK * (room + prepared)
        return (2 * block * config.hidden_size + work) * FLOAT_BYTES + logits
    width, inner = config.hidden_size, config.intermediate_size
    mlp = 3 * width + 4 * inner  # the layer's input, its norm, the result; gate and up, and what becomes of them
    attention = 3 * width + (query + 2 * key) + 3 * (query + key) + 2 * query
    return (
        (2 * width + max(mlp, attention)) * block * dtype.itemsize
        + _mask_bytes(config, dtype, rows, chunk, tokens)
        + logits
    )


def _mask_bytes(config: ModelConfig, dtype: torch.dtype, rows: int, chunk: int, tokens: int) -> int:
    """Bytes of the masks of all kinds of layers, [B or 1, 1, G * Q, T]; as rows of different lengths need them."""
    group = config.num_attention_heads // config.num_key_value_heads
    total = 0
    for kind in set(config.layer_types):
        span = tokens
        if kind == SLIDING and config.sliding_window is not None:
            span = min(tokens, config.sliding_window + chunk)
        total += rows * group * chunk * span * dtype.itemsize
    return total
