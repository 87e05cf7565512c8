"""Temperature, filters and noise of sampling, compiled: the results of `model.sampling` and `model.noise` in torch.

Torch's logarithms and sorts of a vocabulary take longer than a small network's layers, and wake up threads of their own
that compete with the kernels'.

Shapes: B rows, Q positions a row, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.draw import Draw
from layerskip.model.native.library import SamplingView, load_library
from layerskip.model.native.threads import kernel_threads

MOST_TOP_K = 2**31 - 1
"""Tokens: the largest number that the structure holds."""


def is_available() -> bool:
    """Whether these functions can be called here."""
    return load_library() is not None


@functools.lru_cache(maxsize=64)
def sampling_view(draw: Draw) -> SamplingView:
    """The structure for a `Draw`, which keeps its arrays alive; built once, because every round asks for it."""
    floats, integers = ctypes.c_float * draw.num_rows, ctypes.c_int32 * draw.num_rows
    return SamplingView(
        temperatures=floats(*draw.temperatures),
        top_p=floats(*draw.top_p),
        min_p=floats(*draw.min_p),
        top_k=integers(*(min(k, MOST_TOP_K) for k in draw.top_k)),
        seeds=(ctypes.c_uint64 * draw.num_rows)(*draw.seeds),
    )


def filter_scores(draw: Draw, logits: Tensor) -> Tensor:
    """`sampling.filter_scores`: [B, Q, V] for logits [B, Q, V], float32 on the CPU, which aren't changed."""
    library = load_library()
    assert library is not None
    scores = logits.clone(memory_format=torch.contiguous_format)
    rows, queries, vocab_size = scores.shape
    threads = kernel_threads()
    library.layerskip_filter(sampling_view(draw), scores.data_ptr(), rows, queries, vocab_size, threads)
    return scores


def gumbel(keys: Sequence[Sequence[int]], vocab_size: int, start: int = 0) -> Tensor:
    """`noise.gumbel`: [B, Q, V] for [B][Q] keys, up to the rounding of logarithms."""
    library = load_library()
    assert library is not None
    flat = [key for row in keys for key in row]
    noise = torch.empty(len(keys), len(keys[0]), vocab_size)
    places = (ctypes.c_uint64 * len(flat))(*flat)
    library.layerskip_gumbel(places, len(flat), start, vocab_size, noise.data_ptr(), kernel_threads())
    return noise
