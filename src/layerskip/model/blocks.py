"""Weights in blocks of 32 along their inputs, as GGUF files have them: formats that native kernels keep as they are.

Shapes: O output width, I input width, G = I / 32 blocks in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 32
"""Weights of a block."""
BlockFormat = Literal["q8_0", "q4_0", "q4_1"]
BLOCK_BYTES: dict[BlockFormat, int] = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
"""Bytes of a block: a float16 scale (and for q4_1 a float16 minimum), then the numbers."""


def block_bytes(format_: BlockFormat, outputs: int, inputs: int) -> int:
    """Bytes of a weight [O, I] in blocks."""
    return outputs * (inputs // BLOCK) * BLOCK_BYTES[format_]


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight [O, I] in the blocks of a file.

    q8_0: scale, 32 signed bytes; weight = scale * number.
    q4_0: scale, 16 bytes, inputs 0..15 in the low halves and 16..31 in the high ones; weight = scale * (number - 8).
    q4_1: scale, minimum, 16 bytes as above; weight = scale * number + minimum.
    """

    format: BlockFormat
    data: Tensor
    """[O, G * bytes of a block], uint8."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.data), self.data.shape[1] // BLOCK_BYTES[self.format] * BLOCK

    def rows(self, indices: Tensor) -> "BlockWeight":
        """Some outputs, in the order of `indices` [N]."""
        return BlockWeight(self.format, self.data[indices])

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
        blocks = self.data.reshape(outputs, inputs // BLOCK, BLOCK_BYTES[self.format])
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        if self.format == "q8_0":
            return (scale * blocks[..., 2:].view(torch.int8).float()).reshape(outputs, inputs)
        first = 4 if self.format == "q4_1" else 2
        packed = blocks[..., first:]
        numbers = torch.cat([packed & 0xF, packed >> 4], dim=-1).float()
        if self.format == "q4_0":
            return (scale * (numbers - 8)).reshape(outputs, inputs)
        minimum = blocks[..., 2:4].contiguous().view(torch.float16).float()
        return (scale * numbers + minimum).reshape(outputs, inputs)


def stacked(parts: Sequence[BlockWeight]) -> BlockWeight:
    """Weights of one format, one below the other."""
    return parts[0] if len(parts) == 1 else BlockWeight(parts[0].format, torch.cat([part.data for part in parts]))
