"""Weights that all matter, for models that nobody trained."""

from typing import Any


def randomize(model: Any, seed: int) -> None:
    """Give every weight a random value that matters: transformers starts norms at 1, biases at 0, the rest near 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # norms and biases: keep their centre, 1 or 0
                weight.add_(0.3 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
