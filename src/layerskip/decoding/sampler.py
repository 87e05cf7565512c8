"""From logits to tokens, each row of a block by its own rules: penalties, filters, then the best score or a draw.

Draft and target use the same rules and, where acceptance is coupled, the same noise.

Shapes: B rows, Q positions a row, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.penalties import Penalty, penalties_of
from layerskip.model.draw import Draw
from layerskip.model.finite import best_tokens
from layerskip.model.noise import Purpose, gumbel, make_key
from layerskip.model.sampling import add_noise, filter_scores

Contexts = Sequence[Sequence[Sequence[int]]]
"""[B][Q] token ids that precede each position."""


class Sampler:
    """The distributions that the rows of a block ask for, and draws from them."""

    def __init__(self, configs: Sequence[GenerationConfig], seeds: Sequence[int]) -> None:
        """Put rules together.

        Args:
            configs: Rules of each row.
            seeds: Seed of each row.
        """
        self._penalties: list[list[Penalty]] = [penalties_of(config) for config in configs]
        self._seeds = tuple(seeds)
        self.draw = make_draw(configs, seeds)
        """How a network draws the rows' tokens; None where every row takes the most likely one."""

    @property
    def needs_context(self) -> bool:
        """Whether scores depend on the tokens before a position, beyond what the logits know."""
        return any(self._penalties)

    def scores(self, logits: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Apply penalties and filters.

        Args:
            logits: [B, Q, V], float32; not changed.
            contexts: Needed if `needs_context`.

        Returns:
            [B, Q, V], unnormalized log-probabilities; -inf for tokens that are filtered out.
        """
        if self.needs_context:
            assert contexts is not None
            logits = logits.clone()
            for b, (penalties, row) in enumerate(zip(self._penalties, contexts, strict=True)):
                for q, context in enumerate(row if penalties else ()):
                    for penalty in penalties:
                        logits[b, q] = penalty(context, logits[b, q])
        return logits if self.draw is None else filter_scores(self.draw, logits)

    def choose(
        self,
        scores: Tensor,
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """Take the best token, or draw one by adding Gumbel noise.

        Args:
            scores: [B, Q, V] from `scores`.
            first: Position in its sequence of each row's first token to choose; the others follow.
            purpose: Which noise to draw with.
            counters: Tells repeated draws at the same position apart; 0 if not given.

        Returns:
            [B, Q] token ids; `NO_TOKEN` where no score is a finite number.
        """
        if self.draw is None:
            return best_tokens(scores)
        return best_tokens(add_noise(scores, self.noise(scores, first, purpose, counters), self.draw))

    def noise(
        self,
        scores: Tensor,
        first: Sequence[int],
        purpose: Purpose = Purpose.TARGET,
        counters: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, Q, V], what `choose` adds to scores of this shape."""
        keys = [
            [make_key(seed, purpose, start + q, counter) for q in range(scores.shape[1])]
            for seed, start, counter in zip(self._seeds, first, counters or [0] * len(self._seeds), strict=True)
        ]
        return gumbel(keys, scores.shape[-1], scores.device)


def make_draw(configs: Sequence[GenerationConfig], seeds: Sequence[int]) -> Draw | None:
    """How to draw each row's tokens; None where every row takes the most likely one."""
    if not any(config.samples for config in configs):
        return None
    return Draw(
        temperatures=tuple(config.temperature if config.samples else 0.0 for config in configs),
        top_k=tuple(config.top_k if config.samples else 0 for config in configs),
        top_p=tuple(config.top_p if config.samples else 1.0 for config in configs),
        min_p=tuple(config.min_p if config.samples else 0.0 for config in configs),
        seeds=tuple(seeds),
    )
