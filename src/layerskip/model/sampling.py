"""TEMPORARY"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.draw import Draw
from layerskip.model.finite import best_tokens
from layerskip.model.noise import Purpose, gumbel, make_key


def filter_scores(draw: Draw, logits: Tensor) -> Tensor:
    from layerskip.model.native import sampling as native_sampling

    out = []
    for b in range(logits.shape[0]):
        if draw.temperatures[b] == 0:
            out.append(logits[b : b + 1])
        else:
            one = Draw(
                temperatures=draw.temperatures[b : b + 1],
                top_k=draw.top_k[b : b + 1],
                top_p=draw.top_p[b : b + 1],
                min_p=draw.min_p[b : b + 1],
                seeds=draw.seeds[b : b + 1],
            )
            out.append(native_sampling.filter_scores(one, logits[b : b + 1]))
    return torch.cat(out)


def add_noise(scores: Tensor, noise: Tensor, draw: Draw) -> Tensor:
    if all(draw.temperatures):
        return scores + noise
    draws = torch.tensor([t > 0 for t in draw.temperatures], device=scores.device)[:, None, None]
    return torch.where(draws, scores + noise, scores)


def choose_among(scores: Tensor, draw: Draw | None, first: Sequence[int]) -> Tensor:
    if draw is None:
        return best_tokens(scores)
    keys = [
        [make_key(seed, Purpose.TARGET, start + q) for q in range(scores.shape[1])]
        for seed, start in zip(draw.seeds, first, strict=True)
    ]
    return best_tokens(add_noise(scores, gumbel(keys, scores.shape[-1], scores.device), draw))
