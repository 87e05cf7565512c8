"""What agreement with the last layer is worth: the speedup of self-speculative decoding without overhead."""

from dataclasses import dataclass

MAX_DRAFTS = 16


@dataclass(frozen=True, kw_only=True)
class IdealSpeedup:
    """The best that one exit can do."""

    exit_layer: int
    num_speculations: int
    speedup: float
    """Over autoregressive decoding; below 1 where drafting doesn't pay."""


def ideal_speedup(
    acceptance: float,
    *,
    exit_layer: int,
    num_layers: int,
    head_cost: float = 0.0,
    draft_head_cost: float | None = None,
) -> IdealSpeedup:
    """Speedup with the best number of drafts, when reading the weights is all that takes time.

    A pass over some rows then costs as much as over one, and layers cost the same.

    Args:
        acceptance: Probability that a draft is accepted after those before it; an exit's agreement with the last layer.
        exit_layer: E, layers that draft.
        num_layers: L.
        head_cost: Cost of the LM head, in layers.
        draft_head_cost: The same of what makes a draft of the exit's state; `head_cost` if not given.

    Source: arXiv:2211.17192, theorem 3.8, with drafts of E layers whose work verification doesn't repeat.
    """
    plain = num_layers + head_cost
    draft = exit_layer + (head_cost if draft_head_cost is None else draft_head_cost)

    def speedup(drafts: int) -> float:
        tokens = sum(acceptance**i for i in range(drafts + 1))
        return tokens * plain / (drafts * draft + plain)

    best = max(range(1, MAX_DRAFTS + 1), key=speedup)
    return IdealSpeedup(exit_layer=exit_layer, num_speculations=best, speedup=speedup(best))
