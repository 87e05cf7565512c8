"""From logits to tokens: penalties that look at the context, filters, then argmax, with noise where tokens are sampled.

Shapes: B rows, Q positions a row, V vocabulary, T tokens before a position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.model.draw import Draw
from layerskip.model.finite import best_tokens
from layerskip.model.noise import Purpose, gumbel, make_key
from layerskip.model.sampling import filter_scores

Contexts = Sequence[Sequence[Sequence[int]]]
"""[B][Q] token ids that precede each position."""


class Sampler:
    """The distribution that a config asks for, and samples from it; draft and target use the same one."""

    def __init__(self, config: GenerationConfig) -> None:
        """Take the rules of `config`, for every row alike."""
        self.samples = config.samples
        self._config = config

    @property
    def needs_context(self) -> bool:
        """Whether scores depend on the tokens before a position, beyond what the logits know."""
        return self._config.repetition_penalty != 1.0 or self._config.no_repeat_ngram_size > 0

    def draw(self, seeds: Sequence[int]) -> Draw | None:
        """How a network may sample tokens for rows with these seeds itself; None where the likeliest is taken."""
        if not self.samples:
            return None
        config, num_rows = self._config, len(seeds)
        return Draw(
            temperatures=(config.temperature,) * num_rows,
            top_k=(config.top_k,) * num_rows,
            top_p=(config.top_p,) * num_rows,
            min_p=(config.min_p,) * num_rows,
            seeds=tuple(seeds),
        )

    def scores(self, logits: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Apply penalties, temperature and filters.

        Args:
            logits: [B, Q, V], float32; not changed.
            contexts: Needed if `needs_context`.

        Returns:
            [B, Q, V], unnormalized log-probabilities; -inf for tokens that are filtered out.
        """
        if self.needs_context:
            assert contexts is not None
            logits = logits.clone()
            for row, row_contexts in zip(logits, contexts, strict=True):
                for scores, context in zip(row, row_contexts, strict=True):
                    penalize(scores, context, self._config.repetition_penalty, self._config.no_repeat_ngram_size)
        draw = self.draw([0] * len(logits))
        return logits if draw is None else filter_scores(draw, logits)

    def choose(
        self,
        scores: Tensor,
        seeds: Sequence[int],
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """Take the best token, or sample one by adding Gumbel noise.

        Args:
            scores: [B, Q, V] from `scores`.
            seeds: Seed of each row.
            first: Position of each row's first token to choose; the others follow.
            purpose: Which noise to sample with.
            counters: Tells repeated samples at the same position apart; 0 if not given.

        Returns:
            [B, Q] token ids; `NO_TOKEN` where no score is a finite number.
        """
        if not self.samples:
            return best_tokens(scores)
        return best_tokens(scores + self.noise(scores, seeds, first, purpose, counters))

    def noise(
        self,
        scores: Tensor,
        seeds: Sequence[int],
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, Q, V], what `choose` adds to scores of this shape."""
        keys = [
            [make_key(seed, purpose, start + q, counter) for q in range(scores.shape[1])]
            for seed, start, counter in zip(seeds, first, counters or [0] * len(seeds), strict=True)
        ]
        return gumbel(keys, scores.shape[-1], scores.device)


def penalize(scores: Tensor, context: Sequence[int], repetition_penalty: float, no_repeat_ngram_size: int) -> None:
    """Apply what depends on the tokens before a position, to the last bit as transformers' logits processors do it.

    Args:
        scores: [V], the logits of one position; changed in place.
        context: T token ids before it.
        repetition_penalty: Divides the positive scores of tokens that occurred and multiplies the negative ones.
        no_repeat_ngram_size: Length of runs of tokens of which none may occur twice; 0 is off.
    """
    tokens = torch.tensor(context, dtype=torch.long)
    if repetition_penalty != 1.0:
        seen = tokens.to(scores.device)
        score = scores[seen]
        scores[seen] = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    if 0 < no_repeat_ngram_size <= len(tokens):
        runs = tokens.unfold(0, no_repeat_ngram_size, 1)
        same_beginning = (runs[:, :-1] == tokens[len(tokens) + 1 - no_repeat_ngram_size :]).all(-1)
        scores[runs[same_beginning, -1].to(scores.device)] = -torch.inf
