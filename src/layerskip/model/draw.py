"""How tokens are drawn."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Rules by which the rows of a block draw tokens from logits, one value for each row.

    The noise depends on seed, position and token alone (`noise.gumbel`).
    """

    temperatures: tuple[float, ...]
    """Divide the logits; 0: the most likely token is taken."""
    top_k: tuple[int, ...]
    """0: all tokens."""
    top_p: tuple[float, ...]
    """1: all tokens."""
    min_p: tuple[float, ...]
    """0: all tokens."""
    seeds: tuple[int, ...]
