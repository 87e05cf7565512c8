"""What rules add to logits and take from them before tokens are filtered: biases, then penalties.

Shapes: V vocabulary, T tokens before a position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig


def looks_back(config: GenerationConfig) -> bool:
    """Whether penalties look at the tokens before a position."""
    return (
        config.repetition_penalty != 1.0
        or config.no_repeat_ngram_size > 0
        or config.frequency_penalty != 0.0
        or config.presence_penalty != 0.0
    )


def adjusts(config: GenerationConfig) -> bool:
    """Whether logits are changed before tokens are filtered."""
    return looks_back(config) or bool(config.logit_bias)


def adjust(
    scores: Tensor, context: Sequence[int], config: GenerationConfig, *, prompt_length: int = 0, first: int = 0
) -> None:
    """Apply a config's biases and penalties.

    Args:
        scores: [V], the logits of one position; changed in place.
        context: T token ids before it.
        config: The rules.
        prompt_length: Tokens of the context that are the prompt's.
        first: The token that the first score is of, where there are those of a part of the vocabulary.
    """
    here = [(token - first, bias) for token, bias in config.logit_bias if 0 <= token - first < len(scores)]
    if here:
        places, biases = zip(*here, strict=True)
        scores[torch.tensor(places, device=scores.device)] += torch.tensor(biases).to(scores)
    if config.repetition_penalty != 1.0 or config.no_repeat_ngram_size:
        penalize(scores, context, config.repetition_penalty, config.no_repeat_ngram_size, first)
    if config.frequency_penalty or config.presence_penalty:
        penalize_counts(scores, context[prompt_length:], config.frequency_penalty, config.presence_penalty, first)


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


def penalize_counts(
    scores: Tensor, generated: Sequence[int], frequency_penalty: float, presence_penalty: float, first: int = 0
) -> None:
    """Make tokens less likely that were generated before, by OpenAI's formula: score - count x frequency - presence.

    Args:
        scores: [V], the logits of one position; changed in place.
        generated: The tokens before it without the prompt's, which don't count.
        frequency_penalty: For each time that a token was generated.
        presence_penalty: For tokens that were generated at all.
        first: The token that the first score is of, where there are those of a part of the vocabulary.
    """
    tokens, counts = torch.unique(torch.tensor(generated, dtype=torch.long), return_counts=True)
    here = (tokens >= first) & (tokens < first + len(scores))
    places = (tokens[here] - first).to(scores.device)
    scores[places] -= (counts[here] * frequency_penalty + presence_penalty).to(scores)
