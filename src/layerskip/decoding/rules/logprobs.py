"""Log-probabilities of tokens, and of the likeliest ones in their place, from a network's raw logits.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNEMBED_CHUNK = 256
"""Positions of a prompt whose logits are computed at once: this bounds their memory."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """How likely a token was where it stands, by the model itself: before temperature, penalties and biases."""

    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place with theirs, in descending order; of equals the one with the lower id first."""


def token_logprobs(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens at some positions.

    Args:
        logits: [N, V], float32, as the network gives them.
        tokens: N token ids, one for each position.
        num_top: Likeliest tokens to tell at each; 0: none.
    """
    if not tokens:
        return []
    logprobs = logits.log_softmax(-1)
    places = torch.tensor(tokens, device=logits.device).clamp(min=0).unsqueeze(-1)
    chosen = logprobs.gather(-1, places).squeeze(-1).tolist()
    if not num_top:
        return [TokenLogprobs(logprob=logprob) for logprob in chosen]
    num_top = min(num_top, logits.shape[-1])
    least = logprobs.topk(num_top).values[:, -1]
    top = [_best(row, bound, num_top) for row, bound in zip(logprobs, least, strict=True)]
    return [TokenLogprobs(logprob=logprob, top=best) for logprob, best in zip(chosen, top, strict=True)]


def _best(logprobs: Tensor, least: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The best of [V] in a fixed order, which `topk` doesn't promise among equals; those without a chance are left out.

    Args:
        logprobs: [V].
        least: The `count`-th highest.
        count: How many are wanted.
    """
    tokens = ((logprobs >= least) & logprobs.isfinite()).nonzero().squeeze(-1)  # ascending
    values, order = logprobs[tokens].sort(descending=True, stable=True)
    return tuple(zip(tokens[order[:count]].tolist(), values[:count].tolist(), strict=True))
