"""Liger's fused cross-entropy on CUDA: LM head and loss in one kernel that never keeps all logits."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.training.data.packing import IGNORED
from layerskip.training.recipe.exit_loss import FusedCrossEntropy, Head


def liger_cross_entropy(head: Head, device: torch.device) -> FusedCrossEntropy | None:
    """The fused loss with an LM head.

    Args:
        head: Norm and LM head.
        device: Device of its weights.

    Returns:
        None without CUDA or liger_kernel, or if the LM head is no plain matrix product (quantized, scaled, or with
        adapters).
    """
    plain = type(head.linear) is nn.Linear and head.scale == 1.0
    if device.type != "cuda" or not plain or find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", softcap=head.softcap)
    return partial(_call, loss, head.linear)


def _call(loss: nn.Module, linear: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    total: Tensor = loss(linear.weight, hidden, labels, linear.bias)
    return total.float()
