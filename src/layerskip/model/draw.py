"""Rules by which a network samples tokens: values for each row, in a module that compiled kernels can import."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How tokens are sampled from logits; the noise depends on seed, position and token alone (`noise.gumbel`).

    Every field has one value for each row of the batch.
    """

    temperatures: tuple[float, ...]
    """Divisor of the logits; 0: take the likeliest token, whatever the row's other values are."""
    top_k: tuple[int, ...]
    """Number of likeliest tokens to sample from; 0: all."""
    top_p: tuple[float, ...]
    """Probability up to which the likeliest tokens are kept; 1: all."""
    min_p: tuple[float, ...]
    """Share of the likeliest token's probability below which tokens are left out; 0: none."""
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.temperatures, self.top_k, self.top_p, self.min_p, self.seeds)}
        assert len(lengths) == 1, self

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.seeds)
