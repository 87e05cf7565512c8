"""Drafts one by one, for rows that may stop early: each is a graph, and the host asks in between whether to go on.

A whole round drafts a fixed number. Where drafting may stop, a graph of the whole round would run every draft and
ignore the rest: none of the layers that stopping is to save would be saved. So one graph makes one draft, wherever in
the round it comes, and what it has found stays on the device: tokens, states, confidences, counts. The host reads three
numbers a row after each, and then replays the same graph, or the one that verifies as many drafts as there are.

Shapes: B rows, K drafts a row at most, D width.
"""

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.graphs.choosing import choose, confidences, filtered, rates_of
from layerskip.model.graphs.rows import RowTensors
from layerskip.model.graphs.static import RoundParts, RoundShape, StaticPart
from layerskip.model.positions import ValueSource


class DraftState:
    """What is kept from one draft to the next, where graphs of the same size find it."""

    def __init__(self, num_rows: int, most: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate.

        Args:
            num_rows: B.
            most: K.
            width: D.
            dtype: Of states.
            device: Where everything lives.
        """
        with torch.inference_mode(False):
            self.step = torch.zeros(1, dtype=torch.long, device=device)
            """Passes so far; set to 0 before a round, all else begins by it."""
            self.token = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
            self.tokens = torch.zeros(num_rows, most + 1, dtype=torch.long, device=device)
            """[B, K + 1], the drafts; the last column is never read."""
            self.states = torch.zeros(num_rows, most + 1, width, dtype=dtype, device=device)
            """[B, K + 1, D], outputs of layer E - 1 for the pending token and the drafts."""
            self.chance = torch.ones(num_rows, dtype=torch.float64, device=device)
            """[B], the probability that all drafts so far are accepted."""
            self.counts = torch.zeros(num_rows, dtype=torch.long, device=device)
            """[B], drafts that are worth being verified."""
            self.open = torch.zeros(num_rows, dtype=torch.bool, device=device)
            """[B], rows that draft on."""


class StaticDraft(StaticPart):
    """One pass through the first layers, and the draft after it; or the pass alone, over the last draft."""

    def __init__(self, parts: RoundParts, shape: RoundShape, cache: KVCache, state: DraftState) -> None:
        """As `StaticPart`, with what is kept from one draft to the next."""
        super().__init__(parts, shape, cache)
        self._state = state

    def __call__(self, inputs: Tensor) -> Tensor:
        """Make the next draft.

        Returns:
            [B, 3], float64: whether the row drafts on, its drafts so far, and the confidence of this one; zeros if
            nobody asks.
        """
        state, shape, rows = self._state, self.shape, RowTensors.of(inputs)
        begins, step = state.step == 0, state.step.clamp(max=shape.num_drafts)
        token, position = torch.where(begins, rows.token, state.token), rows.first + step
        hidden = self._run(self._parts.embed(token), position, 0, shape.exit_layer, rows.first)
        state.states.index_copy_(1, step, hidden)
        state.step.add_(1)
        found = torch.zeros(shape.num_rows, 3, dtype=torch.float64, device=inputs.device)
        if shape.kind == "last":
            self._write_keys(hidden, position, rows.first)
            return found
        logits = self._read(hidden, position, shape.exit_layer, rows.first, ValueSource.COMMITTED)
        scores = filtered(logits, rows, shape.draws)
        chosen = choose(scores, rows, self._noise(rows, step, 1))
        state.token.copy_(chosen)
        state.tokens.index_copy_(1, step, chosen)
        return self._count(rows, begins, confidences(scores, chosen).squeeze(1)) if shape.asks else found

    def _count(self, rows: RowTensors, begins: Tensor, confidence: Tensor) -> Tensor:
        """Count a draft of each row that drafts on, as `DraftCounts` does."""
        state = self._state
        still_open = torch.where(begins, rows.limits > 0, state.open)
        chance = torch.where(begins, 1.0, state.chance) * rates_of(confidence, rows)
        counted = still_open & (chance >= rows.kept)
        counts = torch.where(begins, 0, state.counts) + counted
        goes_on = counted & (chance >= rows.least) & (counts < rows.limits)
        state.chance.copy_(chance)
        state.counts.copy_(counts)
        state.open.copy_(goes_on)
        return torch.stack((goes_on.double(), counts.double(), confidence.double()), 1)
