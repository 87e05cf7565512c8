"""What a strategy under comparison does: decode a prompt, timed."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One prompt, decoded once."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    """Fields of `GenerationStats`, as far as the strategy has them."""


class Runner(Protocol):
    """Decodes a prompt by one strategy."""

    @property
    def options(self) -> dict[str, Any]:
        """What it was told, for the record."""
        ...

    def run(self, prompt: list[int]) -> Decoded:
        """Decode, timed."""
        ...
