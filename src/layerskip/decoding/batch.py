"""The state of a generation: rows of text, the cache that belongs to them, and how tokens are chosen."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.ngram import NgramIndex
from layerskip.decoding.policy import Policy
from layerskip.decoding.sampler import Sampler
from layerskip.decoding.stats import StatsRecorder, Stopwatch
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.draw import Draw
from layerskip.model.finite import NO_TOKEN, not_finite

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(kw_only=True, eq=False)
class Row:
    """One prompt and what has been written after it."""

    index: int
    """The prompt's place among the caller's prompts."""
    tokens: list[int]
    """Prompt and output; the last one has no keys and values yet."""
    prompt_length: int
    max_new_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end it."""
    finish_reason: FinishReason | None = None
    round_start: int = 0
    """Length of `tokens` before the last step."""
    stop_reason: int | str | None = None
    """The token or text that ended it, where the reason is `stop`."""
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    _ngrams: NgramIndex | None = None

    @property
    def output(self) -> list[int]:
        """Tokens written so far."""
        return self.tokens[self.prompt_length :]

    @property
    def ngrams(self) -> NgramIndex:
        """Runs of tokens in the text so far; made when first asked for."""
        self._ngrams = self._ngrams or NgramIndex()
        self._ngrams.extend(self.tokens[len(self._ngrams) :])
        return self._ngrams

    @property
    def remaining(self) -> int:
        """Tokens that may still be written."""
        return self.prompt_length + self.max_new_tokens - len(self.tokens)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, *, length: int | None = None) -> None:
        """End the row, keeping the first `length` tokens of its output (all of them if not given)."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if length is not None:
            self.recorder.cut_round(self.prompt_length + length - self.round_start)
            del self.tokens[self.prompt_length + length :]


@dataclass(kw_only=True, eq=False)
class Batch:
    """Rows that are still being written. Row r of the cache belongs to `rows[r]`, and holds all its tokens but one."""

    decoder: Decoder
    cache: KVCache
    rows: list[Row]
    config: GenerationConfig
    sampler: Sampler
    stopwatch: Stopwatch
    policy: Policy

    @property
    def by_distribution(self) -> bool:
        """Whether drafts are accepted by rejection sampling, and not by comparing tokens."""
        return self.sampler.samples and self.config.acceptance == "rejection"

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever came before."""
        return not (self.sampler.samples or self.sampler.needs_context)

    @property
    def chooses_directly(self) -> bool:
        """Whether drafts and targets depend on nothing but their logits, and the noise of `draw`."""
        return not (self.sampler.needs_context or self.by_distribution)

    @property
    def draw(self) -> Draw | None:
        """How to draw tokens; None where the likeliest is taken."""
        return self.sampler.draw(self.seeds)

    @property
    def seeds(self) -> list[int]:
        """Seed of each row."""
        return [row.seed for row in self.rows]

    @property
    def last_tokens(self) -> list[int]:
        """The last token of each row, on the host."""
        return [row.tokens[-1] for row in self.rows]

    def pending(self) -> Tensor:
        """The last token of each row, [B, 1]."""
        return torch.tensor([[token] for token in self.last_tokens], device=self.decoder.device)

    def contexts(self, drafts: list[list[int]] | None = None) -> list[list[list[int]]] | None:
        """Tokens before each position that follows the row's text and 0, 1, ... of its drafts; None if not needed."""
        if not self.sampler.needs_context:
            return None
        if drafts is None:
            return [[row.tokens] for row in self.rows]
        return [
            [row.tokens + draft[:i] for i in range(len(draft) + 1)]
            for row, draft in zip(self.rows, drafts, strict=True)
        ]

    def round(self, token: int, drafts: tuple[int, ...] = (), num_accepted: int = 0) -> "Round":
        """What a step gave a row.

        Raises:
            NotFiniteError: A token could not be chosen.
        """
        if token == NO_TOKEN or NO_TOKEN in drafts[:num_accepted]:
            raise not_finite(self.decoder.dtype)
        return Round(drafts=drafts, num_accepted=num_accepted, token=token)

    def drop_finished(self) -> None:
        """Free the cache rows of finished texts, while others go on."""
        for position in range(len(self.rows) - 1, -1, -1):
            if self.rows[position].finish_reason is not None:
                last = self.rows.pop()
                if position < len(self.rows):
                    self.rows[position] = last
                if self.rows:
                    self.cache.remove_row(position)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one step gave one row: the drafts, how many of them hold, and the target's token after those."""

    drafts: tuple[int, ...] = ()
    num_accepted: int = 0
    token: int
