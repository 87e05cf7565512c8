"""What a network is built as: where, in which types, by which kernels, and with which weights for drafting."""

from dataclasses import dataclass
from typing import Literal

import torch

from layerskip.model.graphs.compiled import RoundMode

NetworkKind = Literal["torch", "native"]


@dataclass(frozen=True, kw_only=True)
class DraftWeights:
    """How the weights that draft differ from those that verify."""

    quantize: str | None = None
    """Fewer bits, for a copy of the first half of the layers and of the head; None: the same layers."""
    tokens: tuple[int, ...] | None = None
    """Ids among which drafts are chosen; None: all."""


@dataclass(frozen=True, kw_only=True)
class LoadingPlan:
    """What to build of a checkpoint's tensors; `checkpoint.loading.plan` makes one that this machine can carry out."""

    device: torch.device
    """Where the weights go."""
    dtype: torch.dtype
    """Of the weights in memory, and of hidden states and cache."""
    context: int
    """Longest sequence, in tokens, that will be run."""
    network: NetworkKind = "torch"
    """native: compiled kernels. torch: torch's operators."""
    rounds: RoundMode | None = None
    """How whole greedy rounds are compiled, in a network in torch; None: not at all."""
    uses_before: int | None = None
    """Times that a round runs before it is compiled; as often as pays if not given."""
    quantize: str | None = None
    """Fewer bits for layers and head, a key of `quantization.QUANTIZATIONS`; None: `dtype`, or the file's blocks."""
    draft: DraftWeights | None = None
    """Other weights to draft with; None: the same."""

    @property
    def keeps_blocks(self) -> bool:
        """Whether weights stay in the blocks that a GGUF file has them in."""
        return self.network == "native" and self.quantize is None
