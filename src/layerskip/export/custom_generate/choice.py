"""Choosing tokens: the same processors and the same noise for drafts and for the model's own tokens.

Shapes: B rows, Q query tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from .noise import gumbel, make_key
from .rows import Rows


class Chooser:
    """Chooses the token at a place of the text, in the way of transformers' greedy decoding or sampling."""

    def __init__(self, processors: Any, rows: Rows, seed: int | None) -> None:
        """Take the settings.

        Args:
            processors: A `LogitsProcessorList`; may be empty.
            rows: The texts.
            seed: Seed of the noise for sampling; None for greedy decoding.
        """
        self._processors, self._rows, self._seed = processors, rows, seed
        self._vocab_size = 0
        self._noise: Tensor | None = None  # [B, Q, V] of this round

    def begin_round(self, tokens: int, vocab_size: int | None = None) -> None:
        """Draw the noise of the next places.

        Args:
            tokens: Q, the number of tokens that this round can add to a text.
            vocab_size: V, which the first round names.
        """
        self._vocab_size = vocab_size or self._vocab_size
        if self._seed is None:
            return
        rows = self._rows
        ends = [length - padding for length, padding in zip(rows.lengths, rows.paddings, strict=True)]
        keys = [[make_key(self._seed, end + place) for place in range(tokens)] for end in ends]
        self._noise = gumbel(keys, self._vocab_size, rows.device)

    def choose(self, logits: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Tokens of one place, [B], and the scores that they were chosen by, [B, V].

        Args:
            logits: [B, V].
            offset: Number of tokens between the text and this place; they have been written into the table of ids.
        """
        scores = self._process(logits.to(self._rows.device, torch.float32), offset)
        return self._pick(scores, slice(offset, offset + 1)).view(-1), scores

    def choose_all(self, logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens of all places of a round, [B, Q], and the scores of each, [B, V].

        Args:
            logits: [B, Q, V].
        """
        logits = logits.to(self._rows.device, torch.float32)
        if self._processors:
            scores = [self._process(logits[:, offset].clone(), offset) for offset in range(logits.shape[1])]
            logits = torch.stack(scores, dim=1)
        else:
            scores = list(logits.unbind(1))
        return self._pick(logits, slice(0, logits.shape[1])), scores

    def _pick(self, scores: Tensor, places: slice) -> Tensor:
        if self._noise is not None:
            scores = scores + (self._noise[:, places] if scores.dim() == 3 else self._noise[:, places.start])
        return scores.argmax(dim=-1)

    def _process(self, logits: Tensor, offset: int) -> Tensor:
        """Apply the processors to each row with its own text before it: some count its tokens."""
        rows = self._rows
        if not self._processors:
            return logits
        lengths = set(rows.lengths)
        if len(lengths) == 1:
            return self._processors(rows.ids[:, : rows.lengths[0] + offset], logits)  # type: ignore[no-any-return]
        scores = torch.empty_like(logits)
        for length in lengths:
            same = [row for row, other in enumerate(rows.lengths) if other == length]
            scores[same] = self._processors(rows.ids[same, : length + offset], logits[same])
        return scores
