"""Random numbers that depend on nothing but where they are used: seed, purpose, position, token.

A counter-based hash makes them the same for draft and target, for any batch and on any device, without state.

Shapes: B rows, Q positions a row, V vocabulary.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from layerskip.model.native import sampling as native_sampling

_MASK64, _MASK32 = 2**64 - 1, 2**32 - 1


class Purpose(IntEnum):
    """What a random number is for; those of different purposes are independent."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    LAYER_DROPOUT = 4


def make_key(seed: int, purpose: Purpose, position: int, counter: int = 0) -> int:
    """64-bit key of the random numbers at one place.

    Args:
        seed: The generation's seed.
        purpose: What they are for.
        position: Index in the row's text of the token being chosen.
        counter: Tells repeated draws at the same place apart.
    """
    key = _mix64(seed & _MASK64)
    for part in (purpose, position, counter):  # each part is spread over all bits before it meets the others
        key = _mix64(key ^ _mix64((part + 0x9E3779B97F4A7C15) & _MASK64))
    return key


def gumbel(keys: Sequence[Sequence[int]], vocab_size: int, device: torch.device, start: int = 0) -> Tensor:
    """Standard Gumbel noise for each key and token.

    argmax(log p + noise) is distributed as p, and two distributions that share the noise choose the same token as
    often as they agree (Gumbel coupling). Source: arXiv:2408.07978.

    Args:
        keys: [B][Q] keys from `make_key`.
        vocab_size: V.
        device: Where the noise goes.
        start: The first token, where the noise of a part of the vocabulary is asked for.

    Returns:
        [B, Q, V], float32.
    """
    if device.type == "cpu" and native_sampling.is_available():
        return native_sampling.gumbel(keys, vocab_size, start)
    return gumbel_in_torch(keys, vocab_size, device, start)


def gumbel_in_torch(keys: Sequence[Sequence[int]], vocab_size: int, device: torch.device, start: int = 0) -> Tensor:
    """`gumbel` without compiled kernels."""
    low = torch.tensor([[key & _MASK32 for key in row] for row in keys], device=device).unsqueeze(-1)
    high = torch.tensor([[key >> 32 for key in row] for row in keys], device=device).unsqueeze(-1)
    # A 32-bit avalanche hash in 64-bit arithmetic: no product below can overflow into the sign.
    x = torch.arange(start, start + vocab_size, device=device) * 0x9E3779B1 & _MASK32
    x = (x + low).bitwise_and_(_MASK32)
    x = x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_MASK32).bitwise_xor_(high)
    x = x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_MASK32)
    x = x.bitwise_xor_(x >> 15)
    # -log1p(-u) keeps full relative precision for small u, which is where the largest noise comes from.
    uniform = x.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(uniform.neg_()).neg_().log_().neg_()


def uniforms(keys: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """One number in [0, 1) for each key: [B][Q] -> [B, Q], float64."""
    values = [[(_mix64(key) >> 11) * 2.0**-53 for key in row] for row in keys]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _mix64(x: int) -> int:
    """SplitMix64's finalizer, a bijection of 64-bit numbers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31
