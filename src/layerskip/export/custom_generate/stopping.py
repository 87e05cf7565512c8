"""Where texts end."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from .rows import Rows


class StopCheck:
    """Applies transformers' stopping criteria to one new token after another, as plain decoding does."""

    def __init__(self, criteria: Any, rows: Rows) -> None:
        """Sort the criteria.

        Args:
            criteria: A `StoppingCriteriaList`.
            rows: The texts.
        """
        self._rows = rows
        self._max_length: int | None = None
        self._end_tokens: set[int] = set()
        self._others = []
        for criterion in criteria:
            # The two usual ones need no tensors, and so no wait for the device.
            if type(criterion) is MaxLengthCriteria:
                self._max_length = min(criterion.max_length, self._max_length or criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self._end_tokens |= set(torch.as_tensor(criterion.eos_token_id).view(-1).tolist())
            else:
                self._others.append(criterion)

    def count(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of a row's next tokens belong to its text, and whether it ends with them.

        Args:
            row: Index of the row.
            tokens: What comes after its text, also in the table of ids.
        """
        length = self._rows.lengths[row]
        for index, token in enumerate(tokens):
            columns = length + index + 1
            if token in self._end_tokens or (self._max_length is not None and columns >= self._max_length):
                return index + 1, True
            if self._others:
                ids = self._rows.ids[row : row + 1, :columns]
                if any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self._others):
                    return index + 1, True
        return len(tokens), False
