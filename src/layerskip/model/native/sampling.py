"""Temperature, filters and noise of sampling, compiled: what `decoding.sampling` does with transformers' processors.

Torch's logarithms and sorts of a vocabulary take longer than a small network's layers, and wake up threads of their own
that compete with the kernels'.

Shapes: B rows, Q positions a row, V vocabulary.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.draw import Draw
from layerskip.model.native.library import SamplingView, load_library


def is_available() -> bool:
    """Whether these functions can be called here."""
    return load_library() is not None


def sampling_view(draw: Draw) -> SamplingView:
    """The structure for a `Draw`."""
    return SamplingView(
        temperature=draw.temperatures[0],
        top_p=draw.top_p[0],
        min_p=draw.min_p[0],
        top_k=min(draw.top_k[0], 2**31 - 1),
        seeds=(ctypes.c_uint64 * len(draw.seeds))(*draw.seeds),
    )


def filter_scores(draw: Draw, logits: Tensor) -> Tensor:
    """Divide by the temperature, and make -inf of what top-k, top-p and min-p leave out, in transformers' order.

    Args:
        draw: The rules; seeds don't matter.
        logits: [B, Q, V], float32 on the CPU; not changed.

    Returns:
        [B, Q, V].
    """
    library = load_library()
    assert library is not None
    scores = logits.clone(memory_format=torch.contiguous_format)
    vocab_size = scores.shape[-1]
    rows, threads = scores.numel() // vocab_size, torch.get_num_threads()
    library.layerskip_filter(sampling_view(draw), scores.data_ptr(), rows, vocab_size, threads)
    return scores


def gumbel(keys: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """`noise.gumbel`: [B, Q, V] for [B][Q] keys, up to the rounding of logarithms."""
    library = load_library()
    assert library is not None
    flat = [key for row in keys for key in row]
    noise = torch.empty(len(keys), len(keys[0]), vocab_size)
    places = (ctypes.c_uint64 * len(flat))(*flat)
    library.layerskip_gumbel(places, len(flat), vocab_size, noise.data_ptr(), torch.get_num_threads())
    return noise
