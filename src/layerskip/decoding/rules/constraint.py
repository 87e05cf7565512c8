"""What a grammar tells the engine: which tokens may follow a text, and whether the text may end.

The engine knows no grammars. `structured/` makes constraints of JSON schemas, regular expressions and grammars.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TokenBits = NDArray[np.int32]
"""[ceil(V / 32)]: bit i of word w stands for token 32 w + i."""


class Constraint(Protocol):
    """A grammar on its way along one text; it begins before the first generated token.

    Drafts are tried before they are verified, so it must be able to go back. What it allows depends on the tokens that
    it has taken alone: greedy and seeded texts are the same with and without drafts only if that holds. Each request
    needs one of its own.
    """

    def fill(self, bits: TokenBits) -> bool:
        """Say which tokens may come next, and whether the text may end here.

        Args:
            bits: Is overwritten: 1 for tokens that may come next. What it says of the tokens that end the request
                doesn't matter; they are allowed where the text may end.

        Returns:
            Whether the text may end here.

        Raises:
            ConstraintError: The grammar can't say what may follow.
        """
        ...

    def advance(self, token: int) -> None:
        """Take a token that `fill` has allowed.

        Raises:
            ConstraintError: The token can't be taken, and isn't.
        """
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back; all is then as it was before them, also after an error."""
        ...
