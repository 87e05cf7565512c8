"""Quality of every exit, accumulated while a model is evaluated.

Shapes: N tokens of a batch, D width, L layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.training.data.packing import IGNORED
from layerskip.training.recipe.exit_loss import Head, ce_loss


class ExitStatistics:
    """Sums over tokens of each exit's loss and of its agreement with the last layer."""

    def __init__(self, num_layers: int) -> None:
        self.sums = torch.zeros(2, num_layers, dtype=torch.float64)
        """[2, L]: loss in nats, number of agreements."""
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, head: Head, states: Mapping[int, Tensor], labels: Tensor, chunk_tokens: int) -> None:
        """Add a batch.

        Args:
            head: Norm and LM head.
            states: Output [N, D] of every layer.
            labels: [N] next token, or IGNORED.
            chunk_tokens: Tokens whose logits exist at the same time.
        """
        last = len(states) - 1
        for start in range(0, len(labels), chunk_tokens):
            where = slice(start, start + chunk_tokens)
            wanted, counted = labels[where], labels[where] != IGNORED
            target = head(states[last][where])
            choice = target.argmax(-1)
            for exit_, state in states.items():
                logits = target if exit_ == last else head(state[where])
                agrees = (logits.argmax(-1) == choice) & counted
                found = torch.stack([ce_loss(logits, target, wanted).sum(), agrees.sum()])
                self.sums[:, exit_] += found.double().cpu()
            self.num_tokens += int(counted.sum())

    def add_up_processes(self, accelerator: Any) -> None:
        """Add up the sums of all processes of an accelerate run."""
        if accelerator.num_processes > 1:
            device = accelerator.device
            self.sums = accelerator.reduce(self.sums.to(device), reduction="sum").cpu()
            count = torch.tensor(self.num_tokens, device=device)
            self.num_tokens = int(accelerator.reduce(count, reduction="sum"))

    def qualities(self) -> list[ExitQuality]:
        """Quality of each exit, named by its number of layers; empty if nothing was counted."""
        if not self.num_tokens:
            return []
        losses, agreements = (self.sums / self.num_tokens).tolist()
        return [
            ExitQuality(exit_layer=i + 1, loss=loss, agreement=agreement)
            for i, (loss, agreement) in enumerate(zip(losses, agreements, strict=True))
        ]
