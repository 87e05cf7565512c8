"""Logits that are infinite or not numbers: nothing may be chosen from them.

Shapes: N any leading dimensions, V vocabulary.
"""

import torch
from torch import Tensor

from layerskip.errors import NotFiniteError

NO_TOKEN = -1
"""Stands for a token that could not be chosen. It is looked for where tokens reach the host anyway, so that nothing
waits for a device."""


def best_tokens(scores: Tensor) -> Tensor:
    """[N, V] -> [N], the token with the highest score; `NO_TOKEN` where there is none that is a finite number."""
    best, tokens = scores.max(-1)  # of numbers and something that isn't one, the maximum isn't one either
    return torch.where(best.isfinite(), tokens, NO_TOKEN)


def check_finite(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return logits [N, V] of a network in `dtype`, or raise `NotFiniteError`; waits for the device."""
    if not bool(logits.sum().isfinite()):
        raise not_finite(dtype)
    return logits


def not_finite(dtype: torch.dtype) -> NotFiniteError:
    """The error, of a network in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    advice = "float16 may have overflowed: try bfloat16 or float32" if dtype == torch.float16 else "try float32"
    return NotFiniteError(
        f"the network's logits in {name} are infinite or not numbers, or no token is allowed; {advice}, and if that "
        "changes nothing, the checkpoint's weights are broken, or repetition_penalty or no_repeat_ngram_size forbids "
        "every token"
    )
