"""A constraint along the tokens of a row and the drafts after them: what is allowed, forced, and where the text ends.

Shapes: B rows, Q positions a row, V vocabulary, W tokens of a part of it.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerskip.decoding.rules.constraint import Constraint
from layerskip.errors import ConstraintError


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What may follow some tokens."""

    forbidden: Tensor | None = None
    """[V], True for tokens that may not follow, on the host; None: whatever follows doesn't count."""
    forced: int | None = None
    """The only token that may follow."""
    complete: bool = False
    """Whether nothing but the end may follow."""
    error: str | None = None
    """Why nothing can follow."""

    @property
    def ended(self) -> bool:
        """Whether no token that counts can follow: after an end, a refused token or an error."""
        return self.forbidden is None or self.complete

    def allows(self, token: int) -> bool:
        """Whether a token may follow."""
        return self.forbidden is not None and 0 <= token < len(self.forbidden) and not bool(self.forbidden[token])


Masks = Sequence[Sequence[Step | None]]
"""For each row what may follow at its first positions; None, and no entry for a position: anything."""
_AFTERWARDS = Step()


class Guide:
    """One row's constraint, which follows drafts and goes back with them."""

    def __init__(self, constraint: Constraint, ends: Set[int], vocab_size: int) -> None:
        """Begin before the first generated token.

        Args:
            constraint: A fresh one.
            ends: Tokens that end the row; allowed where the text may end, and nowhere else.
            vocab_size: V.
        """
        self._constraint, self._vocab_size = constraint, vocab_size
        self._ends = [token for token in ends if token < vocab_size]
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self._path: list[int] = []
        """Drafts after the row's tokens that were tried last."""
        self._steps: list[Step] = []
        """What may follow the row's tokens and the first 0, 1, ... of the path."""
        self._num_taken = 0
        """Tokens of the path that the constraint has taken: those before the first end."""

    def at(self, drafts: Sequence[int] = ()) -> Step:
        """What may follow the row's tokens and these drafts."""
        if not self._steps:
            self._steps.append(self._look())
        pairs = zip(self._path, drafts, strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._path), len(drafts)))
        if common < len(drafts):
            self._cut(common)
            for token in drafts[common:]:
                self._steps.append(self._after(self._steps[-1], token))
                self._path.append(token)
        return self._steps[len(drafts)]

    def along(self, drafts: Sequence[int]) -> list[Step]:
        """What may follow the row's tokens and the first 0, 1, ... of these drafts."""
        self.at(drafts)
        return self._steps[: len(drafts) + 1]

    def take(self, tokens: Sequence[int]) -> int:
        """Note what the row has gained; returns how many tokens it keeps: until the text is complete or fails."""
        steps = self.along(tokens)
        last = (i for i, step in enumerate(steps) if step.error is not None or (i and step.complete))
        count = next(last, len(tokens))
        self._cut(count)
        self._path, self._steps, self._num_taken = [], [steps[count]], 0
        return count

    def _cut(self, length: int) -> None:
        """Go back to the first `length` tokens of the path."""
        back = self._num_taken - length
        if back > 0:
            self._constraint.rollback(back)
            self._num_taken = length
        del self._path[length:], self._steps[length + 1 :]

    def _after(self, step: Step, token: int) -> Step:
        if step.ended or token in self._ends or not step.allows(token):
            return _AFTERWARDS
        try:
            self._constraint.advance(token)
        except ConstraintError as error:
            return Step(error=str(error))
        self._num_taken += 1
        return self._look()

    def _look(self) -> Step:
        """What may follow the tokens that the constraint has taken."""
        try:
            may_end = self._constraint.fill(self._bits)
        except ConstraintError as error:
            return Step(error=str(error))
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        allowed[self._ends] = 0
        count = int(np.count_nonzero(allowed))
        complete = count == 0
        if complete and not may_end:
            return Step(error="the grammar allows no token here, and no end")
        if may_end and self._ends:
            allowed[self._ends] = 1
            count += len(self._ends)
        forced = int(allowed.argmax()) if count == 1 and not complete else None
        return Step(forbidden=torch.from_numpy(allowed == 0), forced=forced, complete=complete)


def forbid(logits: Tensor, masks: Masks, tokens: range) -> None:
    """Set logits of tokens that may not follow to -inf.

    Args:
        logits: [B, Q, W]; changed in place.
        masks: What may follow.
        tokens: The W tokens that logits are of.
    """
    places = [
        (row, place, step.forbidden)
        for row, steps in enumerate(masks)
        for place, step in enumerate(steps)
        if step is not None and step.forbidden is not None
    ]
    if not places:
        return
    forbidden = torch.stack([mask[tokens.start : tokens.stop] for _, _, mask in places]).to(logits.device)
    rows = torch.tensor([row for row, _, _ in places], device=logits.device)
    queries = torch.tensor([place for _, place, _ in places], device=logits.device)
    logits[rows, queries] = logits[rows, queries].masked_fill(forbidden, -torch.inf)
