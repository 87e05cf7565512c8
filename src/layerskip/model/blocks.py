"""Weights in blocks of 32 along their inputs, or in rows with a scale: formats that native kernels keep as they are.

Shapes: O output width, I input width, G = I / 32 blocks in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Weights of a block."""
BlockFormat = Literal["q8_0", "q4_0", "q4_1", "int4", "int8"]
BLOCK_BYTES: dict[BlockFormat, int] = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "int4": 18}
"""Bytes of a block: a scale of 16 bits (and for q4_1 a minimum), then the numbers; int8 has rows instead."""
WIDENED: frozenset[BlockFormat | None] = frozenset({"q8_0", "q4_0"})
"""Formats that `BlockWeight.widened` turns into q8_0."""
ROW_SCALE_BYTES = 4
"""Bytes of a row's scale in int8."""


def block_bytes(format_: BlockFormat, outputs: int, inputs: int) -> int:
    """Bytes of a weight [O, I] in blocks."""
    row = ROW_SCALE_BYTES + inputs if format_ == "int8" else inputs // BLOCK * BLOCK_BYTES[format_]
    return outputs * row


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight [O, I] in the blocks of a file; those of the first three are GGUF's.

    q8_0: scale, 32 signed bytes; weight = scale * number.
    q4_0: scale, 16 bytes, inputs 0..15 in the low halves and 16..31 in the high ones; weight = scale * (number - 8).
    q4_1: scale, minimum, 16 bytes as above; weight = scale * number + minimum.
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
        return len(self.data), self.data.shape[1] // BLOCK_BYTES[self.format] * BLOCK

    def rows(self, indices: Tensor) -> "BlockWeight":
        """Some outputs, in the order of `indices` [N]."""
        return BlockWeight(self.format, self.data[indices])

    def padded(self, multiple: int) -> "BlockWeight":
        """With as many inputs of zero that their number is a multiple; whole blocks have one anyway."""
        missing = -self.shape[1] % multiple
        return BlockWeight(self.format, F.pad(self.data, (0, missing))) if missing else self

    def widened(self) -> "BlockWeight":
        """The same numbers as q8_0; of formats without minima only."""
        if self.format == "q8_0":
            return self
        assert self.format == "q4_0", self.format
        blocks = self.data.reshape(len(self.data), -1, BLOCK_BYTES["q4_0"])
        packed = blocks[..., 2:]
        numbers = torch.cat([packed & 0xF, packed >> 4], dim=-1).to(torch.int8) - 8
        return BlockWeight("q8_0", torch.cat([blocks[..., :2], numbers.view(torch.uint8)], -1).flatten(1))

    def dequantize(self) -> Tensor:
        """[O, I], float32: exactly the numbers that the blocks stand for, each product and sum rounded once."""
        outputs, inputs = self.shape
        if self.format == "int8":
            row_scale = self.data[:, :ROW_SCALE_BYTES].contiguous().view(torch.float32)
            return row_scale * self.data[:, ROW_SCALE_BYTES:].contiguous().view(torch.int8).float()
        blocks = self.data.reshape(outputs, inputs // BLOCK, BLOCK_BYTES[self.format])
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
