"""Matrix products with resident weights, in the layout that is fastest for a few rows at a time.

Shapes: N any leading dimensions, I input width, O output width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_ROWS = 8
"""Rows for which packed weights are laid out: decoding multiplies 1 to about 9, and this layout serves them all."""


class Linear(Protocol):
    """y = x W^T + b."""

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        ...


class DenseLinear:
    """Weights as torch keeps them, [O, I]; may be shared with the embedding table."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """Weights reordered by oneDNN into blocks: on a CPU a product of 2 to 9 rows then costs about as much as one row.

    Stock `F.linear` takes two to six times as long for such skinny products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` works here for this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest linear layer for the weight's device and dtype; the weight may be freed afterwards.

    Args:
        weight: [O, I].
        bias: [O], or None.
    """
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)
