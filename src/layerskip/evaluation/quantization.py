"""What fewer bits change: loss and agreement of each exit, and the share of accepted drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.evaluation.inspect.exits import ExitQuality, ExitReport, measure_exits
from layerskip.evaluation.progress import Progress, ignore_progress
from layerskip.language_model import LanguageModel

NUM_PROMPTS = 8
PROMPT_TOKENS = 48
"""Tokens of a prompt, which are taken from the texts at equal distances."""
NEW_TOKENS = 32
NUM_SPECULATIONS = 4


@dataclass(frozen=True, kw_only=True)
class DraftQuality:
    """How many drafts a model accepts from its own early layers."""

    exit_layer: int
    num_speculations: int
    drafted: int
    accepted: float
    """Share of the drafts."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one model, on one text."""

    exits: ExitReport
    drafts: DraftQuality


@dataclass(frozen=True, kw_only=True)
class ExitPair:
    """An exit of both models."""

    exit_layer: int
    before: ExitQuality
    after: ExitQuality


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same text."""

    num_tokens: int
    exits: list[ExitPair]
    drafts_before: DraftQuality
    drafts_after: DraftQuality


def measure(lm: LanguageModel, texts: Sequence[Sequence[int]], *, on_progress: Progress = ignore_progress) -> Quality:
    """Measure exits and drafts of a model.

    Args:
        lm: The model.
        texts: Token ids of each text.
        on_progress: Told of the tokens that were read.

    Raises:
        PromptError: No text has two tokens.
    """
    exits = measure_exits(lm, texts, on_progress=on_progress)
    return Quality(exits=exits, drafts=_measure_drafts(lm, [token for text in texts for token in text]))


def compare(before: Quality, after: Quality) -> Comparison:
    """Put two measurements of the same text side by side."""
    assert before.exits.num_tokens == after.exits.num_tokens
    pairs = zip(before.exits.exits, after.exits.exits, strict=True)
    return Comparison(
        num_tokens=before.exits.num_tokens,
        exits=[ExitPair(exit_layer=first.exit_layer, before=first, after=second) for first, second in pairs],
        drafts_before=before.drafts,
        drafts_after=after.drafts,
    )


def _measure_drafts(lm: LanguageModel, tokens: Sequence[int]) -> DraftQuality:
    """Generate after pieces of the text with drafts of one exit: the first with an adapter, or at half the depth."""
    exit_layer = min(lm.decoder.adapted_exits, default=max(1, lm.decoder.num_layers // 2))
    length = min(PROMPT_TOKENS, len(tokens), lm.decoder.max_context - NEW_TOKENS)
    step = max(1, (len(tokens) - length) // NUM_PROMPTS)
    prompts = [list(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, step)][:NUM_PROMPTS]
    results = lm.generate(
        prompts,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        ignore_eos=True,
        generation_strategy="self_speculative",
        exit_layer=exit_layer,
        num_speculations=NUM_SPECULATIONS,
    )
    drafted = sum(result.stats.drafted for result in results)
    accepted = sum(result.stats.accepted for result in results)
    return DraftQuality(
        exit_layer=exit_layer,
        num_speculations=NUM_SPECULATIONS,
        drafted=drafted,
        accepted=accepted / max(1, drafted),
    )
