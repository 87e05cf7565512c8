"""Losses of exits, computed in chunks of tokens so that the logits of all exits never exist at once.

Shapes: N tokens of a batch, n of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.training.config import ExitLossName
from layerskip.training.data.packing import IGNORED

ExitLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Nats of each token [n], from the exit's logits [n, V], the last layer's logits [n, V] without gradient, and labels
[n]."""
FusedCrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""Nats summed over labelled tokens, from normed hidden states [n, D] and labels [n]."""
ROUND_TO = 256
"""Tokens: numbers of tokens with a label are multiples of this."""
LK_DECAY = 3.0
"""Rate at which the LK loss changes from KL to total variation as acceptance grows."""


def learned_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the tokens that have a label, and their labels.

    Their number is filled up to a multiple of `ROUND_TO` with places whose label is `IGNORED`: sizes that differ in
    every batch would make the memory of a long run grow, by buffers and kernels that are kept for each size.

    Args:
        labels: [N] next token, or IGNORED.
    """
    places = (labels != IGNORED).nonzero().flatten()
    missing = -len(places) % ROUND_TO
    chosen = labels[places]
    return F.pad(places, (0, missing)), F.pad(chosen, (0, missing), value=IGNORED)


def ce_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the text, the paper's loss. Source: arXiv:2404.16710, eq. 5."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def kl_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(last layer || exit): the exit learns the last layer's distribution. Source: arXiv:2407.21082."""
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return divergence.masked_fill(labels == IGNORED, 0.0)


def lk_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL while few drafts would be accepted, and total variation, on which acceptance depends, once many are.

    acceptance a = sum(min(draft, target)) = 1 - TV; loss = b KL + (1 - b) TV with b = exp(-decay a), taken as constant.

    Source: arXiv:2602.23881.
    """
    log_draft, log_target = logits.log_softmax(-1), teacher.log_softmax(-1)
    draft, target = log_draft.exp(), log_target.exp()
    divergence = (target * (log_target - log_draft)).sum(-1)
    variation = 0.5 * (target - draft).abs().sum(-1)
    blend = torch.exp(-LK_DECAY * (1 - variation.detach()))
    return torch.lerp(variation, divergence, blend).masked_fill(labels == IGNORED, 0.0)


EXIT_LOSSES: dict[ExitLossName, ExitLoss] = {"ce": ce_loss, "kl": kl_loss, "lk": lk_loss}


@dataclass(frozen=True, kw_only=True)
class Head:
    """Turns hidden states into logits: the final norm, the LM head, and a family's own steps after it."""

    norm: nn.Module
    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], float32."""
        # .forward: hooks on the LM head are meant for the model's own call
        logits: Tensor = self.linear.forward(self.norm(hidden)).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters, each once."""
        unique = dict.fromkeys([*self.norm.parameters(), *self.linear.parameters()])
        return [parameter for parameter in unique if parameter.requires_grad]


@dataclass(frozen=True, kw_only=True)
class JointLoss:
    """J = sum over exits of weight x loss, over all labelled tokens of a batch. Source: arXiv:2404.16710, eq. 5.

    Gradients are computed together with the loss, a chunk at a time; the backward pass only scales them.
    """

    head: Head
    exit_loss: ExitLoss
    stop_gradient: bool
    """Losses of exits before the last one don't train the norm and the LM head."""
    chunk_tokens: int
    fused: FusedCrossEntropy | None = None
    """Cross-entropy and LM head in one kernel, used if exits learn by `ce`, which needs no logits."""

    def __call__(
        self, states: Mapping[int, Tensor], weights: Mapping[int, float], labels: Tensor, num_items: Tensor | float
    ) -> Tensor:
        """Mean loss.

        Args:
            states: Outputs [N, D] of the layers with a weight, including the last layer.
            weights: w(t, l) of each of these layers.
            labels: [N] next token, or IGNORED.
            num_items: Divisor of the sum over tokens.

        Returns:
            A float32 scalar with gradients for the states and the trained parameters of the LM head.
        """
        exits = sorted(states)
        num_tokens = len(labels)
        total: Tensor = GradientInForward.apply(  # type: ignore[no-untyped-call]
            lambda parts, where: self._losses(exits, parts, weights, labels[where]),
            num_tokens if self.fuses else self.chunk_tokens,
            len(exits),
            *(states[exit_] for exit_ in exits),
            *self.head.parameters(),
        )
        return total / num_items

    @property
    def fuses(self) -> bool:
        """Whether the fused kernel computes everything; it divides the tokens into chunks itself."""
        return self.fused is not None and self.exit_loss is ce_loss

    def _losses(
        self, exits: Sequence[int], parts: Sequence[Tensor], weights: Mapping[int, float], labels: Tensor
    ) -> Iterator[tuple[int, Tensor, bool]]:
        """Weighted sums over a chunk, last layer first: (index of the exit, loss, whether it trains the LM head)."""
        if self.fused is not None and self.fuses:
            for i in reversed(range(len(exits))):
                loss = self.fused(self.head.norm(parts[i]), labels)
                yield i, weights[exits[i]] * loss, i == len(exits) - 1 or not self.stop_gradient
            return
        logits = self.head(parts[-1])
        teacher = logits.detach()
        yield len(exits) - 1, weights[exits[-1]] * ce_loss(logits, teacher, labels).sum(), True
        del logits
        for i, exit_ in enumerate(exits[:-1]):
            loss = self.exit_loss(self.head(parts[i]), teacher, labels).sum()
            yield i, weights[exit_] * loss, not self.stop_gradient


class GradientInForward(torch.autograd.Function):
    """Sum of losses over chunks; the graph of each chunk's loss is freed before the next one is computed."""

    @staticmethod
    def forward(ctx: Any, chunk_losses: Any, chunk_tokens: int, num_states: int, *tensors: Tensor) -> Tensor:
        states, parameters = tensors[:num_states], tensors[num_states:]
        state_grads = [torch.zeros_like(state) if state.requires_grad else None for state in states]
        # Sums over chunks are kept in float32, whatever the parameters' type.
        grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        total = torch.zeros((), device=states[0].device, dtype=torch.float32)
        for start in range(0, states[0].shape[0], chunk_tokens):
            where = slice(start, start + chunk_tokens)
            parts = [state[where].detach().requires_grad_(state.requires_grad) for state in states]
            with torch.enable_grad():
                for i, loss, trains_head in chunk_losses(parts, where):
                    total += loss.detach()
                    wanted = [*([parts[i]] if parts[i].requires_grad else []), *(parameters if trains_head else ())]
                    found = list(torch.autograd.grad(loss, wanted)) if wanted else []
                    state_grad = state_grads[i]
                    if state_grad is not None:
                        state_grad[where] = found.pop(0)
                    for grad, part in zip(grads, found, strict=False):  # None if the LM head isn't trained
                        grad += part
        ctx.grads = [*state_grads, *(grad.to(p.dtype) for grad, p in zip(grads, parameters, strict=True))]
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        return None, None, None, *(None if grad is None else grad * scale for grad in ctx.grads)
