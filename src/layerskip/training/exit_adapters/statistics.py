"""How well adapters predict what the frozen model predicts, accumulated over held-out data.

Shapes: n tokens of a batch, D width, N tokens to draft.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.model.drafts import CONFIDENCE_CLASSES
from layerskip.training.data.packing import IGNORED


class Measured(Protocol):
    """What is measured (`module.AdaptedModel`)."""

    @property
    def exits(self) -> tuple[int, ...]:
        """Number of layers before each adapter."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """[N] ids that adapters draft."""
        ...

    @property
    def head_rows(self) -> Tensor:
        """[N, D]."""
        ...

    def teacher(self, target: Tensor) -> Tensor:
        """Logits [n, V] of the frozen model."""
        ...

    def logits(self, state: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, N] of an adapter."""
        ...


class AdapterStatistics:
    """Sums over tokens, for each adapter."""

    def __init__(self, exits: Sequence[int]) -> None:
        self.exits = tuple(exits)
        self.losses = torch.zeros(len(exits), dtype=torch.float64)
        """Nats: cross-entropy of the frozen model's own choice, among the tokens that adapters draft."""
        self.seen = torch.zeros(len(exits), CONFIDENCE_CLASSES, 2, dtype=torch.float64)
        """Tokens on which an adapter agreed with the frozen model, and all, by the adapter's class of confidence."""

    @torch.no_grad()
    def add(self, model: Measured, states: Sequence[Tensor], target: Tensor, labels: Tensor, chunk: int) -> None:
        """Add a batch.

        Args:
            model: The adapters.
            states: [n, D], output of each.
            target: [n, D], output of the frozen model's last layer.
            labels: [n] next tokens, or IGNORED for those that don't count.
            chunk: Tokens whose logits exist at the same time.
        """
        rows, tokens = model.head_rows, model.tokens
        for start in range(0, len(labels), chunk):
            where = slice(start, start + chunk)
            counts = labels[where] != IGNORED
            choice = model.teacher(target[where])[counts].argmax(-1)
            for i, state in enumerate(states):
                logits = model.logits(state[where], rows)[counts]
                confidence, best = logits.softmax(-1).max(-1)
                ids = best if tokens is None else tokens.to(best.device)[best]
                agrees = ids == choice
                classes = (confidence.square() * CONFIDENCE_CLASSES).long().clamp(max=CONFIDENCE_CLASSES - 1)
                for column, counted in enumerate((agrees.double(), torch.ones_like(agrees, dtype=torch.double))):
                    self.seen[i, :, column].index_add_(0, classes.cpu(), counted.cpu())
                self.losses[i] += self._loss(logits, choice, tokens)

    @staticmethod
    def _loss(logits: Tensor, choice: Tensor, tokens: Tensor | None) -> float:
        if tokens is None:
            return float(F.cross_entropy(logits, choice, reduction="sum"))
        ids = tokens.to(choice.device)
        place = torch.searchsorted(ids, choice).clamp(max=len(ids) - 1)
        known = ids[place] == choice
        return float(F.cross_entropy(logits[known], place[known], reduction="sum")) if bool(known.any()) else 0.0

    def add_up_processes(self, accelerator: Any) -> None:
        """Add up the sums of all processes of an accelerate run."""
        if accelerator.num_processes > 1:
            device = accelerator.device
            self.losses = accelerator.reduce(self.losses.float().to(device), reduction="sum").double().cpu()
            self.seen = accelerator.reduce(self.seen.float().to(device), reduction="sum").double().cpu()

    def qualities(self) -> list[ExitQuality]:
        """Loss and agreement of each adapter; empty if nothing was counted."""
        totals = self.seen.sum(1)
        if not totals[:, 1].all():
            return []
        return [
            ExitQuality(
                exit_layer=exit_layer,
                loss=float(self.losses[i] / totals[i, 1]),
                agreement=float(totals[i, 0] / totals[i, 1]),
            )
            for i, exit_layer in enumerate(self.exits)
        ]
