"""From logits to tokens: transformers' logits processors, then argmax, with noise where tokens are sampled.

On a CPU the rules that depend on logits alone are compiled (`model.native_sampling`).

Shapes: B rows, Q positions a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.model.drafts import Draw
from layerskip.model.finite import best_tokens
from layerskip.model.native import sampling as native_sampling
from layerskip.model.noise import Purpose, gumbel, make_key

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
        self._draw = None
        if config.samples:
            self._draw = Draw(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                seeds=(),
            )

    @property
    def needs_context(self) -> bool:
        """Whether scores depend on the tokens before a position, beyond what the logits know."""
        return bool(self._context_processors)

    def draw(self, seeds: Sequence[int]) -> Draw | None:
        """How a network may draw the tokens of rows with these seeds itself; None where the likeliest is taken."""
        return None if self._draw is None else replace(self._draw, seeds=seeds)

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
        return logits if self._draw is None else _filtered(self._draw, logits)

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


def _context_processors(config: GenerationConfig) -> "list[LogitsProcessor]":
    processors: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        processors.append(RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
    if config.no_repeat_ngram_size > 0:
        from transformers import NoRepeatNGramLogitsProcessor

        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return processors


def _filtered(draw: Draw, logits: Tensor) -> Tensor:
    """[B, Q, V] divided by the temperature, -inf where top-k, top-p or min-p leave a token out."""
    if logits.device.type == "cpu" and native_sampling.is_available():
        return native_sampling.filter_scores(draw, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    no_ids = torch.empty((flat.shape[0], 0), dtype=torch.long, device=flat.device)
    for warper in _warpers(draw):
        flat = warper(no_ids, flat)
    return flat.view(logits.shape)


def _warpers(draw: Draw) -> "list[LogitsProcessor]":
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[LogitsProcessor] = []
    if draw.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(draw.temperature)))
    if draw.top_k > 0:
        warpers.append(TopKLogitsWarper(draw.top_k))
    if draw.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(draw.top_p)))
    if draw.min_p > 0.0:
        warpers.append(MinPLogitsWarper(float(draw.min_p)))
    return warpers
