"""Weights in blocks along their inputs, or in rows with a scale: formats that native kernels keep as they are.

Shapes: O output width, I input width, G blocks in a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Weights of a block, but for those of `BLOCK_WEIGHTS`."""
BlockFormat = Literal["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "int4", "int8"]
BLOCK_BYTES: dict[BlockFormat, int] = {
    "q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q4_k": 144, "q5_k": 176, "q6_k": 210, "int4": 18,
}  # fmt: skip
"""Bytes of a block: scales, minima and numbers; int8 has rows instead."""
BLOCK_WEIGHTS: dict[BlockFormat, int] = {"q4_k": 256, "q5_k": 256, "q6_k": 256}
"""Weights of a block in formats that have more than `BLOCK`."""
ROW_SCALE_BYTES = 4
"""Bytes of a row's scale in int8."""


def block_bytes(format_: BlockFormat, outputs: int, inputs: int) -> int:
    """Bytes of a weight [O, I] in blocks."""
    row = ROW_SCALE_BYTES + inputs if format_ == "int8" else inputs // block_weights(format_) * BLOCK_BYTES[format_]
    return outputs * row


def block_weights(format_: BlockFormat) -> int:
    """Weights of a block; for int8, in which any number of inputs is whole, those of the formats with blocks."""
    return BLOCK_WEIGHTS.get(format_, BLOCK)


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight [O, I] in the blocks of a file; all but those of the last two are GGUF's.

    q8_0: scale, 32 signed bytes; weight = scale * number.
    q4_0: scale, 16 bytes, inputs 0..15 in the low halves and 16..31 in the high ones; weight = scale * (number - 8).
    q4_1: scale, minimum, 16 bytes as above; weight = scale * number + minimum.
    q5_0, q5_1: q4_0 and q4_1 with fifth bits; 16 is subtracted, not 8.
    q4_k, q5_k: scale, minimum, of 256 weights; for each 32, whole numbers that these are multiplied by.
    q6_k: scale of 256 weights, multiplied by a whole number for each 16.
    int4: q4_0 with a scale in bfloat16 instead of float16.
    int8: a float32 scale for the whole row, then I signed bytes; weight = scale * number.
    """

    format: BlockFormat
    data: Tensor
    """[O, bytes of a row], uint8."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        if self.format == "int8":
            return len(self.data), self.data.shape[1] - ROW_SCALE_BYTES
        return len(self.data), self.data.shape[1] // BLOCK_BYTES[self.format] * block_weights(self.format)

    def rows(self, indices: Tensor) -> "BlockWeight":
        """Some outputs, in the order of `indices` [N]."""
        return BlockWeight(self.format, self.data[indices])

    def padded(self, multiple: int) -> "BlockWeight":
        """With as many inputs of zero that their number is a multiple; whole blocks have one anyway."""
        missing = -self.shape[1] % multiple
        return BlockWeight(self.format, F.pad(self.data, (0, missing))) if missing else self

    def dequantize(self) -> Tensor:
        """[O, I], float32: exactly the numbers that the blocks stand for, each product and sum rounded once."""
        outputs, inputs = self.shape
        if self.format == "int8":
            row_scale = self.data[:, :ROW_SCALE_BYTES].contiguous().view(torch.float32)
            return row_scale * self.data[:, ROW_SCALE_BYTES:].contiguous().view(torch.int8).float()
        blocks = self.data.reshape(outputs, inputs // block_weights(self.format), BLOCK_BYTES[self.format])
        if self.format in _READERS:
            return _READERS[self.format](blocks).reshape(outputs, inputs)
        kind = torch.bfloat16 if self.format == "int4" else torch.float16
        scale = blocks[..., :2].contiguous().view(kind).float()
        if self.format == "q8_0":
            return (scale * blocks[..., 2:].view(torch.int8).float()).reshape(outputs, inputs)
        first = 4 if self.format == "q4_1" else 2
        packed = blocks[..., first:]
        numbers = torch.cat([packed & 0xF, packed >> 4], dim=-1).float()
        if self.format in ("q4_0", "int4"):
            return (scale * (numbers - 8)).reshape(outputs, inputs)
        minimum = blocks[..., 2:4].contiguous().view(torch.float16).float()
        return (scale * numbers + minimum).reshape(outputs, inputs)


def int8_rows(numbers: Tensor, scales: Tensor) -> BlockWeight:
    """Signed bytes [O, I] and a scale for each row [O] as `int8`."""
    scale_bytes = scales.float().flatten().view(torch.uint8).view(-1, ROW_SCALE_BYTES)
    return BlockWeight("int8", torch.cat([scale_bytes, numbers.view(torch.uint8)], 1))


def in_blocks(format_: BlockFormat, numbers: Tensor, scales: Tensor) -> BlockWeight:
    """Whole numbers and a scale for each block as `q8_0`, `q4_0` or `int4`.

    Args:
        format_: Of these three.
        numbers: [O, I], int8, from -8 to 7 for those of four bits.
        scales: [O, G], of the format's type: bfloat16 for `int4`, else float16.
    """
    blocks = numbers.reshape(len(numbers), -1, BLOCK)
    if format_ == "q8_0":
        content = blocks.contiguous().view(torch.uint8)
    else:
        shifted = (blocks + 8).view(torch.uint8)
        content = shifted[..., : BLOCK // 2] | shifted[..., BLOCK // 2 :] << 4
    scale_bytes = scales.flatten().view(torch.uint8).view(*scales.shape, 2)
    return BlockWeight(format_, torch.cat([scale_bytes, content], -1).flatten(1))


def stacked(parts: Sequence[BlockWeight]) -> BlockWeight:
    """Weights of one format, one below the other."""
    return parts[0] if len(parts) == 1 else BlockWeight(parts[0].format, torch.cat([part.data for part in parts]))


def _q5_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[..., :2]) * (_five_bits(blocks[..., 2:6], blocks[..., 6:]) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _five_bits(blocks[..., 4:8], blocks[..., 8:])
    return _halves(blocks[..., :2]) * numbers + _halves(blocks[..., 2:4])


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """32 fifth bits [O, G, 4] and four bits [O, G, 16], those of inputs 16..31 in the high halves -> [O, G, 32]."""
    bits = high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return (torch.cat([low & 0xF, low >> 4], -1) | bits.flatten(-2) << 4).float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks[..., :4], blocks[..., 4:16], _nibbles(blocks[..., 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    high = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1
    return _with_minima(blocks[..., :4], blocks[..., 4:16], _nibbles(blocks[..., 48:]) | high << 4)


def _nibbles(low: Tensor) -> Tensor:
    """[O, G, 128], each 32 bytes for two groups, the first in the low halves -> [O, G, 8, 32]."""
    pairs = low.reshape(*low.shape[:-1], 4, 1, BLOCK)
    return torch.cat([pairs & 0xF, pairs >> 4], -2).flatten(-3, -2)


def _with_minima(halves: Tensor, packed: Tensor, numbers: Tensor) -> Tensor:
    """Scale and minimum of a block, each times six bits for each group [O, G, 12], and numbers [O, G, 8, 32]."""
    first, second, third = packed.chunk(3, -1)
    small_scales = torch.cat([first & 63, third & 0xF | first >> 6 << 4], -1).float()
    small_minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1).float()
    scales, minima = _halves(halves[..., :2]) * small_scales, _halves(halves[..., 2:]) * small_minima
    return (scales.unsqueeze(-1) * numbers.float() - minima.unsqueeze(-1)).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    """Of each 128 numbers, 0..31 share bytes of low bits with 64..95, and all quarters those of high bits."""
    rows = blocks.shape[:-1]
    low, high = blocks[..., :128].reshape(*rows, 2, 1, 64), blocks[..., 128:192].reshape(*rows, 2, 1, BLOCK)
    nibbles = torch.cat([low & 0xF, low >> 4], -2).view(*rows, 2, 4, BLOCK)
    pairs = high >> torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(-1) & 3
    numbers = (nibbles | pairs << 4).view(*rows, 16, 16).float() - 32
    scales = _halves(blocks[..., 208:]) * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return (scales.unsqueeze(-1) * numbers).flatten(-2)


def _halves(numbers: Tensor) -> Tensor:
    """[..., 2 n] bytes of float16 -> [..., n]."""
    return numbers.contiguous().view(torch.float16).float()


_READERS: Mapping[BlockFormat, Callable[[Tensor], Tensor]] = {
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
"""[O, G, bytes of a block] -> [O, G, weights of a block]. Every product of a scale and a number is exact in float32, so
that a weight is rounded once, where a minimum is added."""
