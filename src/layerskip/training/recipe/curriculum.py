"""Which exits have a loss at a training step, and how much each weighs. Pure functions.

Layers and steps count from 0; "exit l" is the prediction from the output of layer l. L layers, T steps.
"""

from collections.abc import Collection, Sequence

from layerskip.training.config import Curriculum, ExitWeights


def enabled_exits(
    step: int, *, num_steps: int, exits: Sequence[int], curriculum: Curriculum, rotation: int
) -> list[int]:
    """C(t, l): exits with a loss at this step, in order; the last exit always has one.

    Args:
        step: t.
        num_steps: T, for the gradual curriculum.
        exits: Exits that the curriculum covers, in order and including the last; all exits in the paper.
        curriculum: Name of the rule.
        rotation: R, for the rotational curriculum.

    Source: arXiv:2404.16710, section 4.1.2.
    """
    match curriculum:
        case "rotational":
            chosen = exits[step % rotation :: rotation]
        case "gradual":  # one more exit every T / (2L) steps
            chosen = exits[max(0, len(exits) - 1 - 2 * len(exits) * step // num_steps) :]
        case "all":
            chosen = exits
    return sorted({*chosen, exits[-1]})


def exit_scale(exit_: int, num_layers: int, scale: float, kind: ExitWeights = "depth") -> float:
    """e(l): weight of an exit before normalization.

    `equal` is our addition: the scale for all exits, 1 for the last one. The paper's weights give the early exits,
    which draft, very little: 2 % to the fourth of 16 layers.

    Source: arXiv:2404.16710, eq. 6.
    """
    last = num_layers - 1
    if kind == "equal":
        return scale if exit_ < last else 1.0
    if exit_ < last:
        return scale * exit_ * (exit_ + 1) / 2
    return last + scale * (last - 1) * last / 2


def exit_weights(
    enabled: Collection[int], num_layers: int, scale: float, kind: ExitWeights = "depth"
) -> dict[int, float]:
    """w(t, l): weights of the enabled exits, summing to 1; exits with weight 0 are left out.

    A model of one layer has only its last exit, with weight 1.

    Source: arXiv:2404.16710, eq. 5.
    """
    scales = {exit_: exit_scale(exit_, num_layers, scale, kind) for exit_ in enabled}
    total = sum(scales.values())
    if total == 0:  # L = 1
        return {num_layers - 1: 1.0}
    return {exit_: value / total for exit_, value in scales.items() if value > 0}
