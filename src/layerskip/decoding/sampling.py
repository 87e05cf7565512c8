"""From logits to tokens: transformers' logits processors, then argmax, with noise where tokens are sampled.

Shapes: B rows, Q positions a row, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.noise import Purpose, gumbel, make_key

if TYPE_CHECKING:
    from transformers import LogitsProcessor

Contexts = Sequence[Sequence[Sequence[int]]]
"""[B][Q] token ids that precede each position."""


class Sampler:
    """The distribution that a config asks for, and draws from it; draft and target use the same one."""

    def __init__(self, config: GenerationConfig) -> None:
        """Build the processors that `config` needs, in transformers' order."""
        self.samples = config.samples
        self._context_processors = _context_processors(config)
        self._warpers = _warpers(config) if self.samples else []

    @property
    def needs_context(self) -> bool:
        """Whether scores depend on the tokens before a position, beyond what the logits know."""
        return bool(self._context_processors)

    def scores(self, logits: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Apply the processors.

        Args:
            logits: [B, Q, V], float32; not changed.
            contexts: Needed if `needs_context`.

        Returns:
            [B, Q, V], unnormalized log-probabilities; -inf for tokens that are filtered out.
        """
        if self._context_processors:
            assert contexts is not None
            logits = logits.clone()
            for b, row in enumerate(contexts):
                for q, context in enumerate(row):
                    ids = torch.tensor([context], device=logits.device)
                    for processor in self._context_processors:
                        logits[b, q] = processor(ids, logits[b, q].unsqueeze(0)).squeeze(0)
        if self._warpers:
            flat = logits.reshape(-1, logits.shape[-1])
            no_ids = torch.empty((flat.shape[0], 0), dtype=torch.long, device=flat.device)
            for warper in self._warpers:
                flat = warper(no_ids, flat)
            logits = flat.view(logits.shape)
        return logits

    def choose(
        self,
        scores: Tensor,
        seeds: Sequence[int],
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """Take the best token, or draw one by adding Gumbel noise.

        Args:
            scores: [B, Q, V] from `scores`.
            seeds: Seed of each row.
            first: Position in its text of each row's first token to choose; the others follow.
            purpose: Which noise to draw with.
            counters: Tells repeated draws at the same position apart; 0 if not given.

        Returns:
            [B, Q] token ids.
        """
        if not self.samples:
            return scores.argmax(-1)
        return (scores + self.noise(scores, seeds, first, purpose, counters)).argmax(-1)

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


def _context_processors(config: GenerationConfig) -> "list[LogitsProcessor]":
    processors: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        processors.append(RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
    if config.no_repeat_ngram_size > 0:
        from transformers import NoRepeatNGramLogitsProcessor

        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return processors


def _warpers(config: GenerationConfig) -> "list[LogitsProcessor]":
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[LogitsProcessor] = []
    if config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(config.top_p)))
    if config.min_p > 0.0:
        warpers.append(MinPLogitsWarper(float(config.min_p)))
    return warpers
