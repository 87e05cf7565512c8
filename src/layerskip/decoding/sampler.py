"""From logits to tokens, each row of a block by its own rules: penalties, masks, filters, then the best or a draw.

Draft and target use the same rules and, where acceptance is coupled, the same noise.

Shapes: B rows, Q positions a row, V vocabulary, T tokens before a position.
"""

from collections.abc import Sequence

from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rules.guide import Masks, forbid
from layerskip.decoding.rules.penalties import adjust, adjusts, looks_back
from layerskip.model.choosing.noise import Purpose
from layerskip.model.choosing.sampling import Vocabulary, WholeVocabulary, choose_among
from layerskip.model.draw import Draw

Contexts = Sequence[Sequence[Sequence[int]]]
"""[B][Q] token ids that precede each position."""


class Sampler:
    """The distributions that the rows of a block ask for, and draws from them."""

    def __init__(
        self,
        configs: Sequence[GenerationConfig],
        seeds: Sequence[int],
        vocabulary: Vocabulary | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        """Put rules together.

        Args:
            configs: Rules of each row.
            seeds: Seed of each row.
            vocabulary: The tokens that scores are of; all, as many as there are scores, if not given.
            prompt_lengths: Tokens of each row's prompt, which some penalties don't count; 0 if not given.
        """
        self._vocabulary = vocabulary
        self._configs, self.seeds = configs, tuple(seeds)
        self._prompt_lengths = prompt_lengths or [0] * len(configs)
        self.draw = make_draw(configs, seeds)
        """How a network draws the rows' tokens; None where every row takes the most likely one."""
        self.needs_context = any(map(looks_back, configs))
        """Whether scores depend on the tokens before a position, beyond what the logits know."""
        self.adjusts = any(map(adjusts, configs))
        """Whether logits are changed before tokens are filtered."""

    def vocabulary_of(self, scores: Tensor) -> Vocabulary:
        """The tokens that scores [..., V] are of."""
        return self._vocabulary or WholeVocabulary(scores.shape[-1])

    def scores(self, logits: Tensor, contexts: Contexts | None = None, masks: Masks | None = None) -> Tensor:
        """Apply biases, penalties, masks and filters.

        Args:
            logits: [B, Q, V], float32; not changed.
            contexts: Needed if `needs_context`.
            masks: What constraints allow at each position.

        Returns:
            [B, Q, V], unnormalized log-probabilities; -inf for tokens that are filtered out.
        """
        vocabulary = self.vocabulary_of(logits)
        if self.adjusts or masks is not None:
            logits = logits.clone()
        if self.adjusts:
            assert contexts is not None or not self.needs_context
            for row, (config, length) in enumerate(zip(self._configs, self._prompt_lengths, strict=True)):
                for place, scores in enumerate(logits[row] if adjusts(config) else ()):
                    context = contexts[row][place] if contexts is not None else ()
                    adjust(scores, context, config, prompt_length=length, first=vocabulary.tokens.start)
        if masks is not None:
            forbid(logits, masks, vocabulary.tokens)
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
