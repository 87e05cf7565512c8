"""Rounds of self-speculative decoding: draft with the first layers, verify with the rest, keep what matches.

Source: arXiv:2404.16710, section 4.3. Layers 0..E-1 run once for each token: verification goes on from the states that
drafting left at the exit, and writes the later layers' keys and values into the same cache.

Shapes: B rows, K drafts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .choice import Chooser
from .layer_ranges import LayerRanges
from .rows import Rows
from .shared_cache import SharedCache
from .stopping import StopCheck


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to speculate."""

    num_speculations: int
    """K, the tokens drafted in one round."""
    max_length: int
    """Columns that a text may have, its padding included."""
    confidence: float | None = None
    """Probability below which a token is not drafted, and the round's drafting ends."""
    prefill_chunk_size: int | None = None
    """Tokens of the prompts that are run at a time; None: all."""
    keep_scores: bool = False
    """Whether to keep scores and logits of all tokens."""


@dataclass
class Decoder:
    """Generates the texts of a batch, round by round."""

    ranges: LayerRanges
    rows: Rows
    chooser: Chooser
    stop: StopCheck
    cache: SharedCache
    settings: Settings
    streamer: Any = None
    scores: list[Tensor] = field(default_factory=list)
    """[B, V] of each token, after the processors; only with `keep_scores`."""
    logits: list[Tensor] = field(default_factory=list)
    """[B, V] of each token, before the processors; only with `keep_scores`."""

    def run(self) -> None:
        """Read the prompts, and generate until all rows have ended."""
        self._read_prompts()
        while any(self.rows.is_open):
            self._round()

    def _read_prompts(self) -> None:
        rows, cache = self.rows, self.cache
        prompts = rows.prompts
        width = prompts.shape[1]
        chunk = self.settings.prefill_chunk_size or width
        for start in range(0, width, chunk):
            tokens = prompts[:, start : start + chunk]
            cache.past, size = start, tokens.shape[1]
            logits = self.ranges.run_all(tokens, cache, rows.positions(start, size), rows.mask(start, size))
        cache.past = width
        self.chooser.begin_round(1, logits.shape[-1])
        tokens, scores = self.chooser.choose(logits.clone(), 0)
        rows.write(0, tokens.unsqueeze(1))
        self._extend([[token] for token in tokens.tolist()], [scores], [logits])

    def _round(self) -> None:
        rows, cache, past = self.rows, self.cache, self.cache.past
        shortest = min(n for n, is_open in zip(rows.lengths, rows.is_open, strict=True) if is_open)
        limit = min(self.settings.num_speculations, self.settings.max_length - shortest - 1)
        self.chooser.begin_round(limit + 1)
        states, tokens = self._draft(limit)
        size = len(tokens)
        drafted = torch.cat(tokens, dim=1)
        cache.past = past
        logits = self.ranges.verify(states, drafted, cache, rows.positions(past, size), rows.mask(past, size))
        targets, scores = self.chooser.choose_all(logits)
        # The only wait for the device in a round.
        drafts, chosen = torch.stack([drafted, targets]).tolist()
        rows.write(0, targets)
        self._extend([accept(row[1:], own) for row, own in zip(drafts, chosen, strict=True)], scores, logits.unbind(1))

    def _draft(self, limit: int) -> tuple[list[Tensor], list[Tensor]]:
        """Draft up to `limit` tokens.

        Returns:
            States at the exit, [B, 1, D] each, of the last token and the drafts; and those tokens, [B, 1] each.
        """
        rows, cache, past = self.rows, self.cache, self.cache.past
        states: list[Tensor] = []
        tokens = [rows.last_tokens()]
        for place in range(limit):
            cache.past = past + place
            state, logits = self.ranges.draft(
                tokens[-1], cache, rows.positions(cache.past, 1), rows.mask(cache.past, 1)
            )
            states.append(state)
            token, scores = self.chooser.choose(logits, place)
            if self._is_unsure(scores, token):
                return states, tokens
            tokens.append(token.unsqueeze(1))
            rows.write(place, tokens[-1])
        cache.past = past + limit
        states.append(self.ranges.run_early(tokens[-1], cache, rows.positions(cache.past, 1), rows.mask(cache.past, 1)))
        return states, tokens

    def _is_unsure(self, scores: Tensor, tokens: Tensor) -> bool:
        """Whether the draft's probability is below the threshold in all rows that are still generating."""
        if self.settings.confidence is None:
            return False
        probs: list[float] = scores.softmax(dim=-1).gather(1, tokens.unsqueeze(1)).view(-1).tolist()
        open_probs = [p for p, is_open in zip(probs, self.rows.is_open, strict=True) if is_open]
        return max(open_probs) < self.settings.confidence

    def _extend(self, accepted: list[list[int]], scores: Sequence[Tensor], logits: Sequence[Tensor]) -> None:
        """Commit tokens up to where each text ends; they have been written into the table of ids."""
        rows = self.rows
        counts = [0] * len(rows)
        for row, tokens in enumerate(accepted):
            if rows.is_open[row]:
                counts[row], ends = self.stop.count(row, tokens)
                rows.is_open[row] = not ends
        rows.commit(counts, self.cache)
        if self.settings.keep_scores:  # of a single row
            self.scores += scores[: counts[0]]
            self.logits += [item.float() for item in logits[: counts[0]]]
        if self.streamer is not None:
            self.streamer.put(torch.tensor(accepted[0][: counts[0]]))


def accept(drafts: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The tokens that a round adds: the drafts up to the first mismatch, then the model's own token.

    Args:
        drafts: [K] drafted tokens.
        targets: [K + 1] the model's own tokens, each as if the drafts before it were right.
    """
    matching = next((i for i, draft in enumerate(drafts) if draft != targets[i]), len(drafts))
    return list(targets[: matching + 1])
