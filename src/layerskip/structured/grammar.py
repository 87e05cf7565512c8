"""A compiled grammar, and the constraint that it puts on one text."""

from typing import TYPE_CHECKING

import numpy as np

from layerskip.decoding.rules.constraint import Constraint, TokenBits
from layerskip.errors import ConstraintError, brief

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammar:
    """A grammar that is ready for use; requests and threads may share it."""

    def __init__(self, matcher: "LLMatcher", end: int, num_tokens: int) -> None:
        """Take what `GrammarCompiler` has made.

        Args:
            matcher: Before its first token; it is only copied.
            end: The id that is allowed where a text may end.
            num_tokens: Of the vocabulary that the matcher knows, the end included.
        """
        self._matcher, self._end, self._num_tokens = matcher, end, num_tokens

    def start(self) -> Constraint:
        """A constraint for one request; the state is its own."""
        return GrammarConstraint(self._matcher, self._end, self._num_tokens)


class GrammarConstraint:
    """llguidance's matcher on its way along one text (`decoding.rules.constraint.Constraint`).

    A matcher that has met an error stays in it. A fresh copy then takes the tokens before the error again.
    """

    def __init__(self, fresh: "LLMatcher", end: int, num_tokens: int) -> None:
        """Begin; arguments as for `Grammar`."""
        self._fresh, self._matcher = fresh, fresh.deep_copy()
        self._bits = np.zeros((num_tokens + 31) // 32, np.int32)
        self._end_word, self._end_bit = end // 32, np.array([1 << end % 32], np.uint32).view(np.int32)[0]
        self._address, self._num_bytes = self._bits.ctypes.data, self._bits.nbytes
        self._taken: list[int] = []

    def fill(self, bits: TokenBits) -> bool:
        """As `Constraint.fill`."""
        self._recover()
        self._matcher.unsafe_compute_mask_ptr(self._address, self._num_bytes)
        self._check()
        may_end = bool(self._bits[self._end_word] & self._end_bit)
        self._bits[self._end_word] &= ~self._end_bit
        common = min(len(bits), len(self._bits))
        bits[:common] = self._bits[:common]
        bits[common:] = 0  # the model has more tokens than the tokenizer knows
        return may_end

    def advance(self, token: int) -> None:
        """As `Constraint.advance`."""
        self._recover()
        if not self._matcher.consume_token(token):
            self._check()
            raise ConstraintError(f"the grammar doesn't take the token {token}")
        self._taken.append(token)

    def rollback(self, count: int) -> None:
        """As `Constraint.rollback`."""
        del self._taken[-count:]
        if not self._matcher.is_error():
            self._matcher.rollback(count)

    def _recover(self) -> None:
        if self._matcher.is_error():
            self._matcher = self._fresh.deep_copy()
            self._matcher.consume_tokens(self._taken)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = brief(RuntimeError(self._matcher.get_error()))
            raise ConstraintError(f"the grammar can't be followed any further: {problem}")
