"""The texts of a batch, and which slots of the cache they have.

Texts begin at column 0 of one table of ids, with their left padding. In the cache, they end at one slot instead: the
token that has no keys and values yet comes at slot `past` in every row. So all rows can be run together, and what is
before a row's start is left padding, which the models' own masks leave out. A row of which fewer drafts were accepted
is moved to the right.

Shapes: B rows, Q query tokens, T slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shared_cache import SharedCache


class Rows:
    """Texts, their lengths, and their places in the cache."""

    def __init__(self, prompts: Tensor, paddings: Sequence[int], capacity: int) -> None:
        """Take the prompts.

        Args:
            prompts: [B, Q] ids with left padding.
            paddings: [B] number of padding tokens.
            capacity: Tokens that a row can have, its padding and drafts included.
        """
        batch, width = prompts.shape
        self.device = prompts.device
        self.ids = prompts.new_zeros((batch, capacity))
        self.ids[:, :width] = prompts
        self.paddings = list(paddings)
        self.lengths = [width] * batch
        """Columns of a row's text, its padding included."""
        self.is_open = [True] * batch
        """Whether a row is still generating."""
        self.prompt_start = min(paddings)
        """Columns that are padding in all rows, which aren't run at all."""
        self._row_index = torch.arange(batch, device=self.device)
        self._slots = torch.arange(capacity + 1, device=self.device)
        self._starts = [padding - self.prompt_start for padding in paddings]
        self._start_tensor: Tensor | None = None  # [B, 1]
        self._mask: Tensor | None = None  # [B, T]
        self._place()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def prompts(self) -> Tensor:
        """[B, Q] ids without the columns that are padding in all rows."""
        return self.ids[:, self.prompt_start : self.lengths[0]]

    def positions(self, past: int, queries: int) -> Tensor:
        """Positions of the next tokens in their texts, [B, Q], or [1, Q] where no row is padded."""
        slots = self._slots[past : past + queries].unsqueeze(0)
        return slots if self._start_tensor is None else (slots - self._start_tensor).clamp_(min=0)

    def mask(self, past: int, queries: int) -> Tensor | None:
        """Whether a slot is a row's own, [B, past + Q]; None where all are."""
        return None if self._mask is None else self._mask[:, : past + queries]

    def last_tokens(self) -> Tensor:
        """[B, 1] ids of the tokens without keys and values."""
        if len(set(self.lengths)) == 1:
            return self.ids[:, self.lengths[0] - 1 : self.lengths[0]]
        return self.ids.gather(1, self._columns(-1))

    def write(self, offset: int, tokens: Tensor) -> None:
        """Put tokens, [B, Q], `offset` columns behind the texts, without making the texts longer."""
        if len(set(self.lengths)) == 1:
            start = self.lengths[0] + offset
            self.ids[:, start : start + tokens.shape[1]] = tokens
        else:
            self.ids.scatter_(1, self._columns(offset, tokens.shape[1]), tokens)

    def commit(self, counts: Sequence[int], cache: SharedCache) -> None:
        """Make texts longer, and bring the cache in line.

        Args:
            counts: [B] tokens that join each text. The last of each text has no keys and values yet.
            cache: Keys and values of the texts and whatever was drafted; `past` is set for the next round.
        """
        old_starts = self._starts
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        stored = [length - 1 - padding for length, padding in zip(self.lengths, self.paddings, strict=True)]
        cache.past = max((n for n, is_open in zip(stored, self.is_open, strict=True) if is_open), default=cache.past)
        # A row that has ended keeps nothing: it is run along, and what becomes of it doesn't matter.
        self._starts = [
            cache.past - n if is_open else cache.past for n, is_open in zip(stored, self.is_open, strict=True)
        ]
        for row, (old, new) in enumerate(zip(old_starts, self._starts, strict=True)):
            if self.is_open[row] and new != old:
                cache.shift(row, old, old + stored[row], new - old)
        if self._starts != old_starts:
            self._place()

    def _place(self) -> None:
        """Prepare positions and masks for the rows' starts."""
        if any(self._starts):
            self._start_tensor = torch.tensor(self._starts, device=self.device).unsqueeze(1)
            self._mask = (self._slots >= self._start_tensor).long()
        else:
            self._start_tensor = self._mask = None

    def _columns(self, offset: int, count: int = 1) -> Tensor:
        """[B, count] columns from `offset` behind the texts."""
        ends = torch.tensor(self.lengths, device=self.device).unsqueeze(1) + offset
        return ends + self._slots[:count]
