"""From logits to tokens, each row of a block by its own rules: penalties, filters, then the best score or a draw.

Draft and target use the same rules and, where acceptance is coupled, the same noise.

Shapes: B rows, Q positions a row, V vocabulary, T tokens before a position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.model.draw import Draw
from layerskip.model.noise import Purpose
from layerskip.model.sampling import Vocabulary, WholeVocabulary, choose_among

Contexts = Sequence[Sequence[Sequence[int]]]
"""[B][Q] token ids that precede each position."""


class Sampler:
    """The distributions that the rows of a block ask for, and draws from them."""

    def __init__(
        self, configs: Sequence[GenerationConfig], seeds: Sequence[int], vocabulary: Vocabulary | None = None
    ) -> None:
        """Put rules together.

        Args:
            configs: Rules of each row.
            seeds: Seed of each row.
            vocabulary: The tokens that scores are of; all, as many as there are scores, if not given.
        """
        self._vocabulary = vocabulary
        self._configs, self.seeds = configs, tuple(seeds)
        self.draw = make_draw(configs, seeds)
        """How a network draws the rows' tokens; None where every row takes the most likely one."""
        self.needs_context = any(map(looks_back, configs))
        """Whether scores depend on the tokens before a position, beyond what the logits know."""

    def vocabulary_of(self, scores: Tensor) -> Vocabulary:
        """The tokens that scores [..., V] are of."""
        return self._vocabulary or WholeVocabulary(scores.shape[-1])

    def scores(self, logits: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Apply penalties and filters.

        Args:
            logits: [B, Q, V], float32; not changed.
            contexts: Needed if `needs_context`.

        Returns:
            [B, Q, V], unnormalized log-probabilities; -inf for tokens that are filtered out.
        """
        vocabulary = self.vocabulary_of(logits)
        if self.needs_context:
            assert contexts is not None
            logits, part = logits.clone(), vocabulary.tokens
            for row, row_contexts, config in zip(logits, contexts, self._configs, strict=True):
                for scores, context in zip(row, row_contexts, strict=True):
                    penalize(scores, context, config.repetition_penalty, config.no_repeat_ngram_size, part.start)
        return vocabulary.filter(self.draw, logits)

    def choose(
        self,
        scores: Tensor,
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """Take the best token, or draw one by adding Gumbel noise (`model.sampling.choose_among`).

        Args:
            scores: [B, Q, V] from `scores`.
            first: Position in its sequence of each row's first token to choose; the others follow.
            purpose: Which noise to draw with.
            counters: Tells repeated draws at the same position apart; 0 if not given.

        Returns:
            [B, Q] token ids; `NO_TOKEN` where no score is a finite number.
        """
        return choose_among(scores, self.draw, first, purpose, counters, self._vocabulary)


def looks_back(config: GenerationConfig) -> bool:
    """Whether penalties look at the tokens before a position."""
    return config.repetition_penalty != 1.0 or config.no_repeat_ngram_size > 0


def make_draw(configs: Sequence[GenerationConfig], seeds: Sequence[int]) -> Draw | None:
    """How to draw each row's tokens; None where every row takes the most likely one."""
    if not any(config.samples for config in configs):
        return None
    return Draw(
        temperatures=tuple(config.divisor for config in configs),
        top_k=tuple(config.top_k if config.samples else 0 for config in configs),
        top_p=tuple(config.top_p if config.samples else 1.0 for config in configs),
        min_p=tuple(config.min_p if config.samples else 0.0 for config in configs),
        seeds=tuple(seeds),
    )


def penalize(
    scores: Tensor, context: Sequence[int], repetition_penalty: float, no_repeat_ngram_size: int, first: int = 0
) -> None:
    """Apply what depends on the tokens before a position, to the last bit as transformers' logits processors do it.

    Args:
        scores: [V], the logits of one position; changed in place.
        context: T token ids before it.
        repetition_penalty: Divides the positive scores of tokens that occurred and multiplies the negative ones.
        no_repeat_ngram_size: Length of runs of tokens of which none may occur twice; 0 is off.
        first: The token that the first score is of, where there are those of a part of the vocabulary.
    """

    def here(tokens: Tensor) -> Tensor:
        """Places of those tokens that have a score."""
        places = tokens - first
        return places[(places >= 0) & (places < len(scores))].to(scores.device)

    tokens = torch.tensor(context, dtype=torch.long)
    if repetition_penalty != 1.0:
        seen = here(tokens)
        score = scores[seen]
        scores[seen] = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    if 0 < no_repeat_ngram_size <= len(tokens):
        runs = tokens.unfold(0, no_repeat_ngram_size, 1)
        same_beginning = (runs[:, :-1] == tokens[len(tokens) + 1 - no_repeat_ngram_size :]).all(-1)
        scores[here(runs[same_beginning, -1])] = -torch.inf
