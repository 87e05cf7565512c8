"""What a sweep chooses and a verification goes through: an exit layer with a draft length."""

from typing import NamedTuple


class Setting(NamedTuple):
    """How self-speculative decoding drafts."""

    exit_layer: int
    """Layers that draft (1..L)."""
    num_speculations: int
    """Most tokens to draft in a round."""
