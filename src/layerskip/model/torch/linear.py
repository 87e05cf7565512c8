"""Matrix products with resident weights, by the kernel and in the layout that are fastest for a few rows at a time.

Shapes: N any leading dimensions, I input width, O output width.
"""

from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_ROWS = 8
"""Rows for which packed weights are laid out: decoding multiplies 1 to about 9, and this layout serves them all."""
WIDE = 1024
"""Input width from which float32 weights stay as they are: their rows are then long enough to stream from memory, and a
single row of x takes about a quarter less time than with packed weights, seven rows a seventh more
(`benchmarks/linear_layouts.py`)."""


class Linear(Protocol):
    """y = x W^T + b."""

    @property
    def num_bytes(self) -> int:
        """Bytes that a product of a few rows reads."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        ...


AnyLinear = TypeVar("AnyLinear", bound=Linear)
"""The kind of linear layer that a network is built of."""
Linear_co = TypeVar("Linear_co", bound=Linear, covariant=True)
"""The same, of what is only read."""


class DenseLinear:
    """Weights as torch keeps them, [O, I], and torch's own product; may be shared with the embedding table."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, num_bytes: int | None = None) -> None:
        """Take a weight as it is.

        Args:
            weight: [O, I], of any dtype, or one of torchao's quantized tensors.
            bias: [O], or None.
            num_bytes: Bytes that a product reads, where the dtype doesn't tell.
        """
        self.weight = weight
        self.bias = bias
        self.num_bytes = weight.numel() * weight.itemsize if num_bytes is None else num_bytes
        """Bytes that a product of a few rows reads."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OneDNNLinear:
    """oneDNN's product on a CPU.

    Stock `F.linear` takes up to half as long again for one row and up to three times as long for several. It is ahead
    only where a weight is so small (256 x 256 and below) that oneDNN's fixed cost of a call decides.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take a weight as it is, or packed; only the former may be shared.

        Args:
            weight: [O, I], contiguous, or from `pack`.
            bias: [O], or None.
        """
        self.weight = weight
        self.bias = bias

    @property
    def num_bytes(self) -> int:
        """Bytes that a product of a few rows reads."""
        return self.weight.numel() * self.weight.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result


def pack(weight: Tensor) -> Tensor:
    """A copy reordered into blocks, with which a product of 2 to 9 rows costs little more than one of a single row."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
    return packed


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `OneDNNLinear` works here for this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `make_linear` copies a weight of this input width (I) into another layout."""
    return has_onednn(device, dtype) and (dtype != torch.float32 or width < WIDE)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest linear layer for the weight's device, dtype and width; the weight is kept unless `packs` says so.

    Args:
        weight: [O, I].
        bias: [O], or None.
    """
    if packs(weight.device, weight.dtype, weight.shape[1]):
        return OneDNNLinear(pack(weight), bias)
    if has_onednn(weight.device, weight.dtype):
        return OneDNNLinear(weight.contiguous(), bias)
    return DenseLinear(weight, bias)
