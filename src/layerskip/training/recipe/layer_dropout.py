"""Layer dropout: which layers a sample skips at a training step. Pure functions; `recipe.py` applies them to a model.

Layers and steps count from 0. Shapes: B samples, L layers.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layerskip.model.choosing.noise import Purpose, make_key
from layerskip.training.config import DropoutSchedule


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l): 0 at the first layer, 1 at the last, exponential between.

    Source: arXiv:2404.16710, eq. 3.
    """
    return math.exp(layer * math.log(2) / (num_layers - 1)) - 1 if num_layers > 1 else 0.0


def time_scale(step: int, num_steps: int, schedule: DropoutSchedule) -> float:
    """S(t): 1 throughout, or exponential from 0 at the first step to 1 at the last; 0 in a run of one step.

    Source: arXiv:2404.16710, eq. 4.
    """
    if schedule == "constant":
        return 1.0
    return math.exp(step * math.log(2) / (num_steps - 1)) - 1 if num_steps > 1 else 0.0


def dropout_rates(
    step: int, *, num_steps: int, num_layers: int, dropout_max: float, schedule: DropoutSchedule
) -> list[float]:
    """p(l, t) = S(t) D(l) p_max, the probability that a sample skips layer l at step t.

    Returns:
        L probabilities.

    Source: arXiv:2404.16710, eq. 2.
    """
    scale = time_scale(step, num_steps, schedule) * dropout_max
    return [scale * depth_scale(layer, num_layers) for layer in range(num_layers)]


def draw_kept(rates: Sequence[float], *, seed: int, step: int, samples: Iterable[int]) -> Tensor:
    """Draw which samples each layer keeps.

    A draw depends on nothing but the seed, the step, the layer and the sample's index in the global batch. So all
    processes agree about every sample, however the batch is distributed, and a resumed run draws the same.

    Args:
        rates: L probabilities of skipping.
        seed: The run's seed.
        step: Optimizer step.
        samples: B indices in the global batch of this step.

    Returns:
        [B, L], bool, on the CPU.
    """
    generator = torch.Generator()
    draws = []
    for sample in samples:
        generator.manual_seed(make_key(seed, Purpose.LAYER_DROPOUT, step, sample))
        draws.append(torch.rand(len(rates), generator=generator, dtype=torch.float64))
    return torch.stack(draws) >= torch.tensor(rates, dtype=torch.float64)
