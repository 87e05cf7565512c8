"""What a captured round is told of its rows: one tensor, copied to where the graph reads it.

Settings, seeds and thresholds are numbers in it like the tokens, so one graph serves them all. Fractions travel as the
bits of float64 among int64, so that a round needs one copy.

Shapes: B rows, C columns, K drafts a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip.model.choosing.noise import signed
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule
from layerskip.model.draw import Draw

Draws = Literal["no", "noise", "filters"]
"""How a round's tokens are chosen: the most likely ones; drawn, with min-p at most; or drawn with top-k or top-p, for
which scores are sorted. Rows that don't draw may be among those that do."""

TOKEN, POSITION, SEED, TOP_K, LIMIT = range(5)
NUM_WHOLE = 5
"""Columns of whole numbers; the others are fractions."""
NUM_COLUMNS = NUM_WHOLE + 5 + CONFIDENCE_CLASSES
NEVER = -1.0
"""A threshold that no share of probability falls below."""


def draws_of(draw: Draw | None) -> Draws:
    """What rows with these rules need."""
    if draw is None or not any(draw.temperatures):
        return "no"
    return "filters" if any(draw.top_k) or any(top_p < 1 for top_p in draw.top_p) else "noise"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTensors:
    """The columns, on the device."""

    token: Tensor
    """[B, 1], the pending token."""
    first: Tensor
    """[B], its position: right after what is committed."""
    seeds: Tensor
    """[B], int64 with the bits of the seeds."""
    top_k: Tensor
    """[B]; 0: all."""
    limits: Tensor
    """[B], drafts at most."""
    divisors: Tensor
    """[B], float32, temperatures; 0: the most likely token."""
    left_out: Tensor
    """[B], float32, probability of the least likely tokens that top-p leaves out; `NEVER`: none."""
    min_p: Tensor
    """[B], float32."""
    least: Tensor
    kept: Tensor
    """[B] each, float64, thresholds of the `StopRule`."""
    rates: Tensor
    """[B, CONFIDENCE_CLASSES], float64."""

    @classmethod
    def of(cls, inputs: Tensor) -> "RowTensors":
        """The columns of [B, C], int64."""
        fractions = inputs[:, NUM_WHOLE:].contiguous().view(torch.float64)
        return cls(
            token=inputs[:, TOKEN : TOKEN + 1],
            first=inputs[:, POSITION],
            seeds=inputs[:, SEED],
            top_k=inputs[:, TOP_K],
            limits=inputs[:, LIMIT],
            divisors=fractions[:, 0].float(),
            left_out=fractions[:, 1].float(),
            min_p=fractions[:, 2].float(),
            least=fractions[:, 3],
            kept=fractions[:, 4],
            rates=fractions[:, 5:],
        )


class RowInputs:
    """The tensor that all rounds of so many rows read, and its copy on the host."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        """Allocate both.

        Args:
            num_rows: B, rows without a text included.
            device: Where rounds run.
        """
        on_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # or they couldn't be written outside of it
            self._staged = torch.zeros(num_rows, NUM_COLUMNS, dtype=torch.long, pin_memory=on_cuda)
            self.tensor = torch.zeros_like(self._staged, device=device) if on_cuda else self._staged
        self._device = device
        self._copied: Any = None
        self._rules: tuple[Draw | None, StopRule | None, int] | None = None

    def fill(
        self,
        tokens: Sequence[int] | Tensor,
        positions: Sequence[int],
        scratch: int,
        *,
        draw: Draw | None = None,
        stop: StopRule | None = None,
        limits: Sequence[int] = (),
    ) -> None:
        """Copy what the next round needs to where it is read.

        Rows of the tensor that have no sequence write token 0 into the scratch slot of a cache row that may belong to
        somebody else: nobody reads that slot, and there a query sees numbers only, so that nothing becomes NaN.

        Args:
            tokens: The rows' pending tokens; [rows, 1] where only the device knows them.
            positions: Their positions.
            scratch: Position of the scratch slot.
            draw: How tokens are chosen.
            stop: When drafting ends early.
            limits: Drafts of each row at most.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the device may not have read what was staged last
        number, staged = len(positions), self._staged
        known = [0] * number if isinstance(tokens, Tensor) else list(tokens)
        seeds = [0] * number if draw is None else [signed(seed) for seed in draw.seeds]
        top_k = [0] * number if draw is None else draw.top_k
        whole = list(zip(known, positions, seeds, top_k, limits or [0] * number, strict=True))
        whole += [(0, scratch, 0, 0, 0)] * (len(staged) - number)
        staged[:, :NUM_WHOLE] = torch.tensor(whole)
        if self._rules is None or self._rules[0] is not draw or self._rules[1:] != (stop, number):
            self._rules = draw, stop, number
            staged[:, NUM_WHOLE:] = _fractions(draw, stop, number, len(staged)).view(torch.long)
        if self.tensor is not staged:
            self.tensor.copy_(staged, non_blocking=True)
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self._device))
        if isinstance(tokens, Tensor):
            self.tensor[:number, TOKEN : TOKEN + 1] = tokens


def _fractions(draw: Draw | None, stop: StopRule | None, number: int, num_rows: int) -> Tensor:
    """[B, C - NUM_WHOLE], float64."""
    rule = [NEVER, NEVER, *[1.0] * CONFIDENCE_CLASSES] if stop is None else [stop.least, stop.kept, *stop.rates]
    likeliest = [0.0, NEVER, 0.0]
    rows = [likeliest] * number
    if draw is not None:
        # 1 - p in float64, as `sampling` computes it, and rounded to float32 on the device.
        left_out = [1 - top_p if top_p < 1 else NEVER for top_p in draw.top_p]
        rows = [list(row) for row in zip(draw.temperatures, left_out, draw.min_p, strict=True)]
    rows += [likeliest] * (num_rows - number)
    return torch.tensor([[*row, *rule] for row in rows], dtype=torch.float64)
