"""A layer's experts: a token goes through the few that its router ranks highest, and their outputs are mixed.

Shapes: N tokens, E experts, C experts of a token, D width, I width of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from layerskip.model.torch.linear import Linear, Linear_co


@dataclass(frozen=True, kw_only=True)
class Expert(Generic[Linear_co]):
    """An MLP."""

    gate_up: Linear_co
    """D -> 2 I."""
    down: Linear_co
    """I -> D."""


@dataclass(frozen=True, kw_only=True)
class Experts(Generic[Linear_co]):
    """All experts of a layer."""

    router: Linear_co
    """D -> E."""
    experts: tuple[Expert[Linear_co], ...]
    per_token: int
    """C."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the products of one token read."""
        everything = sum(expert.gate_up.num_bytes + expert.down.num_bytes for expert in self.experts)
        return self.router.num_bytes + everything * self.per_token // len(self.experts)


def run_experts(
    experts: Experts[Linear], x: Tensor, run: Callable[[Linear, Linear, Tensor], Tensor], *, norm_weights: bool
) -> Tensor:
    """The mixture of the outputs of each token's experts; an expert runs once, over all tokens that chose it.

    On an accelerator, the host waits once for the numbers of the experts' tokens.

    Args:
        experts: The weights.
        x: [..., D].
        run: The MLP with an expert's weights, [n, D] -> [n, D].
        norm_weights: Whether the weights of a token's experts sum to 1.

    Returns:
        [..., D].

    Source: arXiv:2401.04088, section 2.1.
    """
    tokens, count = x.reshape(-1, x.shape[-1]), experts.per_token
    probabilities = experts.router(tokens).float().softmax(-1)
    weights, chosen = probabilities.topk(count, -1)  # [N, C]
    if norm_weights:
        weights = weights / weights.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)  # pairs of a token and one of its experts, by expert
    counts = torch.bincount(chosen.flatten(), minlength=len(experts.experts)).tolist()
    parts = torch.split(tokens[order // count], counts)
    outputs = torch.empty(len(order), x.shape[-1], dtype=x.dtype, device=x.device)
    outputs[order] = torch.cat(
        [
            run(expert.gate_up, expert.down, part)
            for expert, part in zip(experts.experts, parts, strict=True)
            if len(part)
        ]
    )
    mixed = torch.einsum("nc,ncd->nd", weights.to(x.dtype), outputs.view(-1, count, x.shape[-1]))
    return mixed.view_as(x)
