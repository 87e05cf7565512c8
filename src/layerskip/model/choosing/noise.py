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
_SPREAD_64, _FIRST_64, _SECOND_64 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SPREAD, _FIRST, _SECOND = (number - 2**64 for number in (_SPREAD_64, _FIRST_64, _SECOND_64))
"""The same bits as int64."""


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
        key = _mix64(key ^ _mix64((part + _SPREAD_64) & _MASK64))
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
    low = torch.tensor([[key & _MASK32 for key in row] for row in keys], device=device)
    high = torch.tensor([[key >> 32 for key in row] for row in keys], device=device)
    return _gumbel(low, high, vocab_size, start)


def gumbel_on_device(seeds: Tensor, positions: Tensor, vocab_size: int, purpose: Purpose = Purpose.TARGET) -> Tensor:
    """`gumbel_in_torch` where only the device knows seeds and positions, to the last bit; the counter is 0.

    Args:
        seeds: [B], int64 with the bits of the seeds (`signed`).
        positions: [B, Q], int64.
        vocab_size: V.
        purpose: What the noise is for.
    """
    keys = keys_on_device(seeds, positions, purpose)
    return _gumbel(keys & _MASK32, keys >> 32 & _MASK32, vocab_size)


def keys_on_device(seeds: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """`make_key` with counter 0: seeds [B], positions [B, Q] -> [B, Q]; all are int64 with the bits of 64-bit numbers.

    Products and sums of int64 keep the lower 64 bits, as the hash needs.
    """
    key = _mix64_on_device(seeds.unsqueeze(1))
    for part in (int(purpose), positions, 0):
        spread = _mix64_on_device(part + _SPREAD) if isinstance(part, Tensor) else signed(_mix64(part + _SPREAD_64))
        key = _mix64_on_device(key ^ spread)
    return key


def signed(number: int) -> int:
    """The int64 with the lower 64 bits of a number."""
    number &= _MASK64
    return number - (number >> 63 << 64)


def _gumbel(low: Tensor, high: Tensor, vocab_size: int, start: int = 0) -> Tensor:
    """Noise of keys by their halves, [B, Q] int64 each -> [B, Q, V]."""
    low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    # A 32-bit avalanche hash in 64-bit arithmetic: no product below can overflow into the sign.
    x = torch.arange(start, start + vocab_size, device=low.device) * 0x9E3779B1 & _MASK32
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
    x = (x ^ x >> 30) * _FIRST_64 & _MASK64
    x = (x ^ x >> 27) * _SECOND_64 & _MASK64
    return x ^ x >> 31


def _mix64_on_device(x: Tensor) -> Tensor:
    """The same of int64: what shifts right must bring zeros, so the copies of the sign are cut off."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * _FIRST
    x = (x ^ (x >> 27 & 2**37 - 1)) * _SECOND
    return x ^ (x >> 31 & 2**33 - 1)
