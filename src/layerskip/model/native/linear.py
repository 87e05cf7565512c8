"""Matrix products with weights in panels of 16 outputs, by the compiled kernels.

A panel serves a product of one row as well as one of many. Numbers that bfloat16 (or float16) represents exactly are
stored in it: half the bytes are read for each token, and no result changes.

Shapes: N any leading dimensions, I input width, O output width.
"""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.native.library import COMPUTE, FORMATS, GROUP, PANEL, LinearView, PackCall, load_library
from layerskip.model.native.memory import WeightMemory
from layerskip.model.native.threads import kernel_threads

INT8_STORAGES = ("int8", "int4", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""Formats whose products can take inputs in 8 bits."""
SUPER = 256
"""Inputs of a block with two levels of scales."""
BFLOAT16_PAIR = 2
"""Number of inputs that products in bfloat16 add up at once."""


class NativeLinear:
    """A weight in panels, and its product (`torch.linear.Linear`)."""

    def __init__(
        self,
        *weights: Tensor | BlockWeight,
        bias: Tensor | None = None,
        storage: str | None = None,
        compute: str = "float32",
        memory: WeightMemory | None = None,
    ) -> None:
        """Lay out a weight.

        Args:
            weights: [O, I], float32 or all in blocks of one format, which they keep; of several, panels alternate.
            bias: For all of them, in the order of the outputs (`interleave`), float32, or None.
            storage: A key of `FORMATS`; if not given, the smallest that holds the numbers exactly. Not for blocks.
            compute: A key of `COMPUTE`: what a product's inputs are rounded to, where it can (`computes`); others stay
                in float32.
            memory: Where panels are kept; memory of its own if not given.
        """
        library = load_library()
        assert library is not None
        memory = memory or WeightMemory()
        outputs, inputs = weights[0].shape
        step = len(weights)
        self.outputs, padded = outputs * step, padded_outputs(outputs, step)
        pack, data = library.layerskip_pack, [_numbers(weight) for weight in weights]
        if isinstance(weights[0], BlockWeight):
            pack, self.storage = library.layerskip_pack_blocks, str(weights[0].format)
        else:
            self.storage = storage or _exact_storage(library, data)
        format_ = FORMATS[self.storage]
        self._panels = memory.empty(library.layerskip_packed_bytes(inputs, padded, format_))
        self._scales = memory.empty(_scale_bytes(inputs, padded, self.storage))
        self._bias = None if bias is None else F.pad(bias.float(), (0, padded - len(bias))).contiguous()
        places = self._panels.data_ptr(), self._scales.data_ptr()
        for first, numbers in enumerate(data):
            pack(PackCall(numbers.data_ptr(), *places, inputs, outputs, format_, first, step, kernel_threads()))
        self.view = LinearView(
            panels=self._panels.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            inputs=inputs,
            outputs=padded,
            format=format_,
            compute=COMPUTE[compute if computes(compute, self.storage, inputs) else "float32"],
        )
        self._multiply = library.layerskip_multiply

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return self._panels.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty(len(rows), self.view.outputs)
        self._multiply(ctypes.byref(self.view), rows.data_ptr(), len(rows), out.data_ptr(), kernel_threads())
        return out[:, : self.outputs].reshape(*x.shape[:-1], self.outputs)


def computes(compute: str, storage: str, inputs: int) -> bool:
    """Whether there are products for this key of `COMPUTE` with weights of a format and this number of inputs.

    In 8 bits these are formats of 4 to 8 bits whose inputs are whole groups, in bfloat16 those in bfloat16 with an even
    number of inputs.
    """
    match compute:
        case "int8":
            return storage in INT8_STORAGES and inputs % GROUP == 0
        case "bfloat16":
            return storage == "bfloat16" and inputs % BFLOAT16_PAIR == 0
        case _:
            return True


def padded_outputs(outputs: int, step: int = 1) -> int:
    """Outputs of `step` weights of this many outputs, in whole panels."""
    return -(-outputs // PANEL) * PANEL * step


def packed_bytes(outputs: int, inputs: int, storage: str, *, step: int = 1) -> int:
    """Bytes that a `NativeLinear` takes, without a bias.

    Args:
        outputs: O, of each weight.
        inputs: I.
        storage: A key of `FORMATS`.
        step: Number of weights whose panels alternate.
    """
    library = load_library()
    assert library is not None
    padded = padded_outputs(outputs, step)
    panels: int = library.layerskip_packed_bytes(inputs, padded, FORMATS[storage])
    return panels + _scale_bytes(inputs, padded, storage)


def _numbers(weight: Tensor | BlockWeight) -> Tensor:
    """A weight's numbers, or its blocks, in one piece of memory."""
    return (weight.data if isinstance(weight, BlockWeight) else weight).contiguous()


def _exact_storage(library: ctypes.CDLL, weights: Sequence[Tensor]) -> str:
    """The smallest format that holds these numbers exactly."""
    for name, fits in (("bfloat16", library.layerskip_fits_bfloat16), ("float16", library.layerskip_fits_float16)):
        if all(fits(weight.data_ptr(), weight.numel()) for weight in weights):
            return name
    return "float32"


def _scale_bytes(inputs: int, outputs: int, storage: str) -> int:
    """Bytes of the scales (and minima) that stand beside the numbers."""
    match storage:
        case "int8":
            return 4 * outputs
        case "int4" | "q8_0" | "q4_0" | "q5_0":
            return 2 * outputs * (inputs // GROUP)
        case "q4_1" | "q5_1":
            return 4 * outputs * (inputs // GROUP)
        case "q4_k" | "q5_k":  # a scale and a minimum, and a byte of each for every group
            return 20 * outputs * (inputs // SUPER)
        case "q6_k":  # a scale, and a byte for every 16 inputs
            return 18 * outputs * (inputs // SUPER)
        case _:
            return 0


def interleave(bias: Tensor) -> Tensor:
    """[2 I] gate above up -> [2 I'], 16 of gate and 16 of up in turn, I' being I up to a whole panel."""
    parts = [F.pad(part, (0, -len(part) % PANEL)) for part in bias.chunk(2)]
    return torch.stack([part.view(-1, PANEL) for part in parts], 1).flatten()
