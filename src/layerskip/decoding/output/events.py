"""Events and results of a generation, as its user sees them."""

from dataclasses import dataclass
from typing import Literal

from layerskip.decoding.policy import DrafterName
from layerskip.decoding.row import FinishReason
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.decoding.stats import GenerationStats

Source = Literal["decoded", "accepted", "corrected", "bonus"]
"""Where a token comes from: plain decoding; an accepted draft; the target, in place of a rejected draft; the target,
after drafts that were all accepted."""


@dataclass(frozen=True, kw_only=True)
class DraftEvent:
    """Drafts that were verified; the next tokens of this prompt say which of them were accepted."""

    index: int
    """The prompt's place in the call."""
    token_ids: tuple[int, ...]
    text: str
    drafter: DrafterName
    """What drafted them."""


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One token of the result."""

    index: int
    """The prompt's place in the call."""
    token_id: int
    text: str
    """Text that is certain with this token; empty while a character is incomplete or a stop string possible."""
    source: Source
    logprobs: TokenLogprobs | None = None
    """How likely the token was, if `GenerationConfig.logprobs` is given."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What was generated after one prompt."""

    text: str
    """Without special tokens and without the stop string; empty if the checkpoint has no tokenizer."""
    token_ids: list[int]
    """Up to and including the end-of-sequence token, or the token that completed a stop string."""
    finish_reason: FinishReason
    """stop: end-of-sequence token or stop string, or a grammar is complete; length: no more tokens allowed;
    interrupted: by the user; error: a constraint can't go on."""
    stop_reason: int | str | None
    """Which token or string stopped it; after an error, what went wrong."""
    seed: int
    """Seed that was used; with it, the same call generates the same text."""
    stats: GenerationStats
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """How likely each token was, if `GenerationConfig.logprobs` is given."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """The same of the prompt's tokens, if the request asks for it; None for the first, which follows nothing."""


@dataclass(frozen=True, kw_only=True)
class FinishEvent:
    """A prompt's generation has ended."""

    index: int
    """The prompt's place in the call."""
    text: str
    """Text that was held back and is certain now."""
    result: GenerationResult


StreamEvent = DraftEvent | TokenEvent | FinishEvent
