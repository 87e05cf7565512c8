"""Weights in fewer bits: in the native kernels' own formats, elsewhere through torchao.

Activations keep the network's dtype; each weight is widened where it is multiplied.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip.errors import InvalidArgumentError
from layerskip.model.native.library import GROUP
from layerskip.model.native.linear import computes
from layerskip.model.native.memory import return_freed_memory
from layerskip.model.torch.linear import DenseLinear

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

QUANTIZATIONS = ("int8", "int4", "fp8")


def check_quantization(name: str, value: str, *, native: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InvalidArgumentError` unless weights can be quantized so on this device.

    Args:
        name: The option.
        value: A key of `QUANTIZATIONS`.
        native: Whether compiled kernels run the network.
        device: Where it runs.
        dtype: Of its activations.
    """
    if value not in QUANTIZATIONS:
        raise InvalidArgumentError(f"{name} {value!r} is not known; use {', '.join(QUANTIZATIONS)}")
    if native:
        if value == "fp8":
            raise InvalidArgumentError(f"{name} 'fp8' needs a CUDA GPU; on a CPU use int8 or int4")
        return
    if value == "int4" and (device.type != "cuda" or dtype != torch.bfloat16):
        raise InvalidArgumentError(
            f"{name} 'int4' runs in bfloat16 on CUDA, or in native kernels on a CPU, not in {dtype} on {device}; "
            "use int8, or float32 with native kernels"
        )
    if value == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise InvalidArgumentError(f"{name} 'fp8' needs a CUDA GPU of compute capability 8.9; use int8 or int4")
    try:
        with _quiet():
            import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise InvalidArgumentError(f"{name} {value!r} needs torchao here: pip install 'layerskip[quant]'") from error


def native_storage(quantize: str | None, inputs: int, compute: str = "float32") -> str | None:
    """The format in which native kernels keep a weight of floats; None: the smallest that holds its numbers exactly."""
    if quantize == "int4" and inputs % GROUP:
        return "int8"
    if quantize is None and compute == "bfloat16" and computes(compute, "bfloat16", inputs):
        return "bfloat16"
    return quantize


def quantize_linear(weight: Tensor, bias: Tensor | None, quantize: str) -> DenseLinear:
    """A torch linear layer with a quantized weight.

    Args:
        weight: [O, I], not kept.
        bias: [O], or None.
        quantize: A key of `QUANTIZATIONS` that passes `check_quantization`.
    """
    from torch import nn
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(nn.Sequential(layer), _torchao_config(quantize))
    return_freed_memory()  # of what torchao computes on the way, several times the weight
    bits = 4 if quantize == "int4" else 8
    return DenseLinear(layer.weight.detach(), bias, num_bytes=weight.numel() * bits // 8)


def quantized_bytes(quantize: str, outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Bytes of a weight that `quantize_linear` makes.

    Args:
        quantize: A key of `QUANTIZATIONS`.
        outputs: O.
        inputs: I.
        dtype: Of the network.
    """
    match quantize:
        case "int8":  # scales, and zeros of a byte
            return outputs * (inputs + dtype.itemsize + 1)
        case "int4":  # scale and zero of each group
            return outputs * (inputs // 2 + inputs // GROUP * 2 * dtype.itemsize)
        case _:
            return outputs * (inputs + 4)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: torchao names its parts that this machine can't load, and none of them is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _torchao_config(quantize: str) -> "AOBaseConfig":
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    match quantize:
        case "int8":
            return Int8WeightOnlyConfig()
        case "int4":
            return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
        case _:
            return Float8WeightOnlyConfig()
