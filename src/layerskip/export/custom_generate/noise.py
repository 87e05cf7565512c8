"""Gumbel noise that depends on seed, position and token alone, so that drafts and verification share it.

The same function as in the `layerskip` package, with which these numbers agree bit for bit.

Shapes: B rows, Q positions a row, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK64, _MASK32 = 2**64 - 1, 2**32 - 1


def draw_seed() -> int:
    """A seed from torch's random numbers, so that `torch.manual_seed` repeats a text."""
    return int(torch.randint(2**62, ()).item())


def make_key(seed: int, position: int) -> int:
    """64-bit key of the noise at one place.

    Args:
        seed: The generation's seed.
        position: Index of the token being chosen in its row's text, padding not counted.
    """
    key = _mix64(seed & _MASK64)
    for part in (0, position, 0):  # purpose and counter, which the package tells apart, are 0 here
        key = _mix64(key ^ _mix64((part + 0x9E3779B97F4A7C15) & _MASK64))
    return key


def gumbel(keys: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise for each key and token.

    argmax(scores + noise) is distributed as softmax(scores), and two distributions that share the noise choose the
    same token as often as they agree. Source: arXiv:2408.07978.

    Args:
        keys: [B][Q] keys from `make_key`.
        vocab_size: V.
        device: Where the noise goes.

    Returns:
        [B, Q, V], float32.
    """
    low = torch.tensor([[key & _MASK32 for key in row] for row in keys], device=device).unsqueeze(-1)
    high = torch.tensor([[key >> 32 for key in row] for row in keys], device=device).unsqueeze(-1)
    # A 32-bit avalanche hash in 64-bit arithmetic: no product below can overflow into the sign.
    x = torch.arange(vocab_size, device=device) * 0x9E3779B1 & _MASK32
    x = (x + low).bitwise_and_(_MASK32)
    x = x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_MASK32).bitwise_xor_(high)
    x = x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_MASK32)
    x = x.bitwise_xor_(x >> 15)
    # -log1p(-u) keeps full relative precision for small u, which is where the largest noise comes from.
    uniform = x.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(uniform.neg_()).neg_().log_().neg_()


def _mix64(x: int) -> int:
    """SplitMix64's finalizer, a bijection of 64-bit numbers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31
