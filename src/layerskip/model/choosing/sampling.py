"""From logits to tokens, on any device: temperature and filters, then the best score with noise added.

On a CPU the filters are compiled, where the kernels were built (`native.sampling`).

Shapes: B rows, Q positions a row, V vocabulary, N positions.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from layerskip.model.choosing.noise import Purpose, gumbel, make_key
from layerskip.model.draw import Draw
from layerskip.model.finite import best_tokens
from layerskip.model.native import sampling as native_sampling


class Vocabulary(Protocol):
    """The tokens that scores are of, and what needs the scores of all tokens.

    Several processes that share a network have a part of the tokens each (`decoders.vocabulary_part`); all of them get
    the same results.
    """

    @property
    def tokens(self) -> range:
        """W token ids, those of the last dimension of scores here."""
        ...

    def filter(self, draw: Draw | None, logits: Tensor) -> Tensor:
        """As `filter_scores`; without rules, the logits themselves: [B, Q, W]."""
        ...

    def best(self, scores: Tensor) -> Tensor:
        """[..., W] -> [...], the token with the highest score; `NO_TOKEN` where there is none that is a number."""
        ...

    def softmax(self, scores: Tensor) -> Tensor:
        """[..., W] -> [..., W], probabilities that sum to 1 over the whole vocabulary."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """[..., W] -> [...], over the whole vocabulary."""
        ...

    def at(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Values of tokens [...] among [..., W]."""
        ...


class WholeVocabulary:
    """All tokens (`Vocabulary`)."""

    def __init__(self, size: int) -> None:
        """Take V."""
        self.tokens = range(size)

    def filter(self, draw: Draw | None, logits: Tensor) -> Tensor:
        """As `filter_scores`."""
        return logits if draw is None else filter_scores(draw, logits)

    def best(self, scores: Tensor) -> Tensor:
        """As `best_tokens`."""
        return best_tokens(scores)

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the last dimension."""
        return scores.softmax(-1)

    def sum(self, values: Tensor) -> Tensor:
        """Over the last dimension."""
        return values.sum(-1)

    def at(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Values of tokens."""
        return values.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def filter_scores(draw: Draw, logits: Tensor) -> Tensor:
    """Divide by the temperature and leave tokens out by top-k, top-p and min-p, in this order, by each row's rules.

    Args:
        draw: The rules; seeds don't matter.
        logits: [B, Q, V], float32; not changed.

    Returns:
        [B, Q, V], unnormalized log-probabilities; -inf for tokens left out. Rows with temperature 0 are as given.
    """
    assert len(logits) == draw.num_rows, (logits.shape, draw)
    if logits.device.type == "cpu" and native_sampling.is_available():
        return native_sampling.filter_scores(draw, logits)
    return filter_in_torch(draw, logits)


def filter_in_torch(draw: Draw, logits: Tensor) -> Tensor:
    """`filter_scores` on any device."""
    return filter_by_rules(draw, logits, _filter)


def filter_by_rules(
    draw: Draw, logits: Tensor, filter_: Callable[[Tensor, float, int, float, float], Tensor]
) -> Tensor:
    """Filter rows that have the same rules together.

    Args:
        draw: The rules.
        logits: [B, Q, V].
        filter_: Filters [N, V] by temperature, top-k, top-p and min-p into a new tensor.
    """
    rules = list(zip(draw.temperatures, draw.top_k, draw.top_p, draw.min_p, strict=True))
    different = dict.fromkeys(rules)
    if len(different) == 1:
        return filter_(logits.flatten(0, 1), *rules[0]).view(logits.shape)
    scores = torch.empty_like(logits)
    for rule in different:
        rows = [row for row, other in enumerate(rules) if other == rule]
        scores[rows] = filter_(logits[rows].flatten(0, 1), *rule).view(len(rows), *logits.shape[1:])
    return scores


def choose_tokens(logits: Tensor, draw: Draw | None, first: Sequence[int]) -> Tensor:
    """Draw tokens, or take the most likely ones.

    Args:
        logits: [B, Q, V], float32; not changed.
        draw: The rules; without them, the most likely token is taken everywhere.
        first: Position of each row's first token to choose; the others follow.

    Returns:
        [B, Q] token ids; `NO_TOKEN` where no score is a finite number.
    """
    return choose_among(logits if draw is None else filter_scores(draw, logits), draw, first)


def choose_among(
    scores: Tensor,
    draw: Draw | None,
    first: Sequence[int],
    purpose: Purpose = Purpose.TARGET,
    counters: Sequence[int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """`choose_tokens` from scores [B, Q, V] that have been filtered.

    Args:
        scores: [B, Q, V], unnormalized log-probabilities.
        draw: The rules; without them, the most likely token is taken everywhere.
        first: Position of each row's first token to choose; the others follow.
        purpose: Which noise to draw with.
        counters: Tells repeated draws at the same position apart; 0 if not given.
        vocabulary: The tokens that scores are of; all if not given.
    """
    vocabulary = vocabulary or WholeVocabulary(scores.shape[-1])
    if draw is None or not any(draw.temperatures):
        return vocabulary.best(scores)
    noise = noise_for(draw, scores, first, purpose, counters, start=vocabulary.tokens.start)
    return vocabulary.best(add_noise(scores, noise, draw))


def noise_for(
    draw: Draw,
    scores: Tensor,
    first: Sequence[int],
    purpose: Purpose = Purpose.TARGET,
    counters: Sequence[int] | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """[B, Q, V], the Gumbel noise for scores of this shape.

    Args:
        draw: As for `choose_among`.
        scores: Only their shape and device matter.
        first: As for `choose_among`.
        purpose: As for `choose_among`.
        counters: As for `choose_among`.
        start: The token that the first score is of.
    """
    keys = [
        [make_key(seed, purpose, start + q, counter) for q in range(scores.shape[1])]
        for seed, start, counter in zip(draw.seeds, first, counters or [0] * draw.num_rows, strict=True)
    ]
    return gumbel(keys, scores.shape[-1], scores.device, start)


def add_noise(scores: Tensor, noise: Tensor, draw: Draw) -> Tensor:
    """Scores [B, Q, V] with noise added in rows that draw; in the others the most likely token stays the best."""
    if all(draw.temperatures):
        return scores + noise
    draws = torch.tensor([temperature > 0 for temperature in draw.temperatures], device=scores.device)
    return torch.where(draws[:, None, None], scores + noise, scores)


def _filter(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[N, V] by one set of rules, to the last bit as transformers' logits warpers do it; returns a new tensor."""
    if temperature == 0:
        return logits.clone()
    scores = logits / temperature
    if top_k > 0:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores.masked_fill_(scores < least, -torch.inf)
    if top_p < 1:
        ascending, tokens = scores.sort()
        left_out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        left_out[:, -1] = False
        scores.masked_fill_(left_out.scatter(1, tokens, left_out), -torch.inf)
    if min_p > 0:
        probs = scores.softmax(-1)
        scores.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return scores
