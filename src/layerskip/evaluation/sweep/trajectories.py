"""One text per prompt, and what every exit would have drafted along it: enough to know every setting's acceptance.

A draft that is accepted has the keys and values of the text, so an exit's guess at a position depends on the text
alone, and not on the rounds that led there. The rounds of any exit and draft length can therefore be replayed.
Source: arXiv:2404.16710, section 3.3 (what is drafted and what is kept).

Shapes: N tokens written, E exit, K drafts a round.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.scoring import exit_states_in_chunks
from layerskip.evaluation.setting import Setting
from layerskip.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A greedy text and the agreement of exits with it."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    """N tokens written, an end-of-sequence token included."""
    max_new_tokens: int
    """Tokens that could have been written."""
    prompt_seconds: float
    """Until the first token."""
    seconds: float
    """Of autoregressive decoding, the prompt included."""
    agreement: dict[int, tuple[bool, ...]]
    """By exit: whether its likeliest token was the text's, for each of the N tokens."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The rounds that one setting would have taken."""

    rounds: Counter[int] = field(default_factory=Counter)
    """Rounds by number of drafts."""
    drafted: int = 0
    accepted: int = 0


def record_trajectory(
    lm: LanguageModel, prompt: Sequence[int], exits: Sequence[int], config: GenerationConfig
) -> Trajectory:
    """Write a text autoregressively, then read it once with all exits.

    Args:
        lm: The model.
        prompt: Token ids.
        exits: Exits to follow, ascending.
        config: How to decode; greedy.

    Raises:
        PromptError: The prompt can't be continued.
    """
    assert not config.samples, "guesses along a sampled text depend on noise"
    result = lm.generate([list(prompt)], config, generation_strategy="autoregressive", exit_layer=None)[0]
    tokens = result.token_ids
    room = min(config.max_new_tokens, lm.decoder.max_context - len(prompt))
    return Trajectory(
        prompt_tokens=len(prompt),
        token_ids=tuple(tokens),
        max_new_tokens=room,
        prompt_seconds=result.stats.time_to_first_token_s,
        seconds=result.stats.seconds,
        agreement=_agreement(lm, list(prompt), tokens, exits),
    )


@torch.inference_mode()
def _agreement(
    lm: LanguageModel, prompt: list[int], written: list[int], exits: Sequence[int]
) -> dict[int, tuple[bool, ...]]:
    text, first = [*prompt, *written], len(prompt) - 1
    agrees: dict[int, list[bool]] = {exit_layer: [] for exit_layer in exits}
    for start, states in exit_states_in_chunks(lm.decoder, text[:-1], exits):
        skipped = max(0, first - start)
        wanted = text[start + skipped + 1 : start + states[0].shape[1] + 1]
        if not wanted:
            continue
        for exit_layer, state in zip(exits, states, strict=True):
            guesses = lm.decoder.unembed(state[:, skipped:], exit_layer)[0].argmax(-1).tolist()
            agrees[exit_layer] += [guess == token for guess, token in zip(guesses, wanted, strict=True)]
    return {exit_layer: tuple(flags) for exit_layer, flags in agrees.items()}


def replay(trajectory: Trajectory, setting: Setting) -> Replay:
    """Go through a text in rounds of up to K drafts of one exit, as self-speculative decoding does.

    The first token comes from reading the prompt; a round drafts no more than may still be written less the target's
    own token; drafts beyond an end-of-sequence token are drafted and don't count as accepted.
    """
    agrees, written = trajectory.agreement[setting.exit_layer], len(trajectory.token_ids)
    rounds: Counter[int] = Counter()
    drafted = accepted = 0
    at = 1
    while at < written:
        drafts = min(setting.num_speculations, trajectory.max_new_tokens - at - 1)
        num_accepted = 0
        while num_accepted < drafts and at + num_accepted < written and agrees[at + num_accepted]:
            num_accepted += 1
        rounds[drafts] += 1
        drafted += drafts
        accepted += num_accepted
        at += num_accepted + 1
    return Replay(rounds=rounds, drafted=drafted, accepted=accepted)
