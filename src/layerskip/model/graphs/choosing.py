"""Tokens chosen as a function of tensors: filters, noise and confidence.

To the last bit, they are those of `model/choosing/sampling.py`.

Shapes: B rows, Q positions a row, N positions of all rows, V vocabulary.
"""

import torch
from torch import Tensor

from layerskip.model.choosing.noise import gumbel_on_device
from layerskip.model.choosing.sampling import WholeVocabulary
from layerskip.model.drafts import CONFIDENCE_CLASSES
from layerskip.model.finite import best_tokens
from layerskip.model.graphs.rows import Draws, RowTensors


def noise_after(rows: RowTensors, offset: Tensor | int, num_queries: int, vocab_size: int) -> Tensor:
    """[B, Q, V], the noise of the tokens that follow Q tokens from `first + offset` on."""
    steps = torch.arange(1, num_queries + 1, device=rows.first.device)
    return gumbel_on_device(rows.seeds, (rows.first + offset).unsqueeze(1) + steps, vocab_size)


def filtered(logits: Tensor, rows: RowTensors, draws: Draws) -> Tensor:
    """As `sampling.filter_scores`, each row by its own rules: [B, Q, V] -> [B, Q, V]."""
    if draws == "no":
        return logits
    shape = logits.shape

    def each(column: Tensor) -> Tensor:
        """[B] -> [N, 1]."""
        return column.unsqueeze(1).expand(shape[:2]).reshape(-1, 1)

    divisors = each(torch.where(rows.divisors > 0, rows.divisors, 1.0))
    flat = logits.flatten(0, 1)
    # On CUDA, torch divides by a number of the host by multiplying with its reciprocal.
    scores = flat * divisors.reciprocal() if logits.device.type == "cuda" else flat / divisors
    if draws == "filters":
        scores = _leave_out(scores, each(rows.top_k), each(rows.left_out))
    probs = scores.softmax(-1)
    least = each(rows.min_p) * probs.amax(-1, keepdim=True)
    scores = scores.masked_fill_(probs < least, -torch.inf)
    return torch.where(each(rows.divisors) > 0, scores, flat).view(shape)


def _leave_out(scores: Tensor, top_k: Tensor, left_out: Tensor) -> Tensor:
    """Top-k, then top-p, from one sorting: [N, V], with [N, 1] each."""
    size = scores.shape[-1]
    ascending, tokens = scores.sort()
    kept = torch.where(top_k > 0, top_k, size).clamp(max=size)
    lowest = ascending.gather(1, size - kept)
    scores = scores.masked_fill_(scores < lowest, -torch.inf)
    ascending = ascending.masked_fill_(ascending < lowest, -torch.inf)
    unlikely = ascending.softmax(-1).cumsum(-1) <= left_out
    unlikely[:, -1].fill_(False)
    return scores.masked_fill_(unlikely.scatter(1, tokens, unlikely), -torch.inf)


def choose(scores: Tensor, rows: RowTensors, noise: Tensor | None) -> Tensor:
    """The best token, in rows that draw with noise added: [B, Q, V] -> [B, Q]; `NO_TOKEN` where there is none."""
    if noise is None:
        return best_tokens(scores)
    return best_tokens(torch.where((rows.divisors > 0)[:, None, None], scores + noise, scores))


def confidences(scores: Tensor, tokens: Tensor) -> Tensor:
    """[B, Q], probabilities of tokens by scores without noise."""
    vocabulary = WholeVocabulary(scores.shape[-1])
    return vocabulary.at(vocabulary.softmax(scores), tokens)


def rates_of(confidence: Tensor, rows: RowTensors) -> Tensor:
    """[B], the rate that each row's `StopRule` gives a draft of this probability [B], by its `confidence_class`."""
    exact = confidence.double()
    place = torch.where(exact > 0, exact * exact * CONFIDENCE_CLASSES, 0.0).clamp(max=CONFIDENCE_CLASSES - 1).long()
    return rows.rates.gather(1, place.unsqueeze(1)).squeeze(1)
