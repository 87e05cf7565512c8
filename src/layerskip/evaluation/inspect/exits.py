"""Quality of each exit on a text: loss, and agreement with the last layer.

Shapes: Q tokens of a text, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from layerskip.decoding.scoring import exit_states_in_chunks
from layerskip.errors import PromptError
from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.language_model import LanguageModel

WINDOW = 1024
"""Tokens read at a time: a longer text is cut into windows."""


@dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """What the first `exit_layer` layers alone predict."""

    exit_layer: int
    loss: float
    """Mean cross-entropy in nats a token."""
    agreement: float
    """Share of positions at which its most likely token is the last layer's."""


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """Quality of all exits, and what it says of the model."""

    exits: list[ExitQuality]
    num_tokens: int
    """Tokens predicted."""
    trained_for_early_exit: bool
    """Whether early layers predict well enough to have been trained for it."""
    recipe: str | None
    """The early-exit training recipe that config.json names, if any."""


EARLY_AGREEMENT = 0.35
"""Agreement at half the depth above which a model counts as made for early exit: ordinary models stay far below."""


@torch.inference_mode()
def measure_exits(
    lm: LanguageModel, texts: Sequence[Sequence[int]], *, on_progress: Progress = ignore_progress
) -> ExitReport:
    """Read texts once and compare every exit with the text and with the last layer.

    Args:
        lm: The model.
        texts: Token ids of each text; longer ones are cut into windows.
        on_progress: Told of the tokens that were read.

    Raises:
        PromptError: No text has two tokens.
    """
    num_layers = lm.decoder.num_layers
    window = min(WINDOW, lm.decoder.max_context)
    windows = [list(text[i : i + window + 1]) for text in texts for i in range(0, max(len(text) - 1, 0), window)]
    if not windows:
        raise PromptError("the text has fewer than two tokens; give a longer one")
    losses, agreed = torch.zeros(num_layers), torch.zeros(num_layers)
    total = sum(len(tokens) - 1 for tokens in windows)
    meter = Meter(on_progress, total)
    for tokens in windows:
        for start, states in exit_states_in_chunks(lm.decoder, tokens[:-1], range(1, num_layers + 1)):
            size = states[0].shape[1]
            wanted = torch.tensor(tokens[start + 1 : start + 1 + size], device=lm.decoder.device)
            last = lm.decoder.checked_logits(states[-1])[0]
            choice = last.argmax(-1)
            for i, state in enumerate(states):  # logits of all exits never exist at once
                logits = last if i == num_layers - 1 else lm.decoder.unembed(state, i + 1)[0]
                losses[i] += F.cross_entropy(logits, wanted, reduction="sum").item()
                agreed[i] += (logits.argmax(-1) == choice).sum().item()
            meter.advance("reading tokens", size)
    exits = [
        ExitQuality(exit_layer=i + 1, loss=losses[i].item() / total, agreement=agreed[i].item() / total)
        for i in range(num_layers)
    ]
    recipe = lm.checkpoint.raw_config.get("layerskip")
    return ExitReport(
        exits=exits,
        num_tokens=total,
        trained_for_early_exit=exits[max(0, num_layers // 2 - 1)].agreement >= EARLY_AGREEMENT,
        recipe=None if recipe is None else str(recipe),
    )
