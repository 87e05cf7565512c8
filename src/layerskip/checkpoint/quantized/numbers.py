"""Whole numbers with scales, in whatever layout they were stored: the numbers that they stand for, and their blocks.

Shapes: O output width, I input width, G groups of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.model.blocks import BLOCK, BlockFormat, BlockWeight, in_blocks, int8_rows

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ keeps output i of eight: four bits at this place of a word, counted from the lowest."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight: each is its number times the scale of its group."""

    numbers: Tensor
    """[O, I], int8 or int16, zero points subtracted."""
    scales: Tensor
    """[O, G], of the file's type."""
    groups: Tensor | None = None
    """[I], the group of each input, where those of a group aren't neighbours."""

    def columns(self, start: int, stop: int) -> "Quantized":
        """Inputs start..stop-1, in whole groups or in parts of one."""
        if self.scales.shape[1] == 1:
            return Quantized(self.numbers[:, start:stop], self.scales)
        return Quantized(self.numbers[:, start:stop], self.scales, self._groups()[start:stop])

    def dequantize(self) -> Tensor:
        """[O, I], float32: each product rounded once."""
        scales, numbers = self.scales.float(), self.numbers.float()
        if scales.shape[1] == 1:
            return numbers.mul_(scales)
        if self.groups is not None:
            return numbers.mul_(scales[:, self.groups])
        parts = numbers.view(len(numbers), scales.shape[1], -1)
        return parts.mul_(scales.unsqueeze(-1)).flatten(1)

    def in_blocks(self, format_: BlockFormat) -> BlockWeight:
        """The same in blocks that native kernels keep."""
        numbers = self.numbers.to(torch.int8)
        if format_ == "int8":
            return int8_rows(numbers, self.scales)
        firsts = self._groups()[::BLOCK]
        scales = self.scales[:, firsts].to(torch.bfloat16 if format_ == "int4" else torch.float16)
        return in_blocks(format_, numbers, scales)

    def _groups(self) -> Tensor:
        if self.groups is not None:
            return self.groups
        size = self.numbers.shape[1] // self.scales.shape[1]
        return torch.arange(self.numbers.shape[1]) // size


def block_format(
    *, bits: int, symmetric: bool, inputs: int, num_groups: int, scale_dtype: torch.dtype
) -> BlockFormat | None:
    """The blocks that hold such numbers exactly; None if there are none.

    Args:
        bits: 8 or 4.
        symmetric: Whether zero points are in the middle; others make numbers of one bit more.
        inputs: I.
        num_groups: G.
        scale_dtype: Type of the scales.
    """
    if bits == 8 and not symmetric:
        return None
    in_blocks_of_32 = inputs % num_groups == 0 and inputs // num_groups % BLOCK == 0
    if bits == 4 and symmetric and in_blocks_of_32 and scale_dtype in (torch.bfloat16, torch.float16):
        return "int4" if scale_dtype == torch.bfloat16 else "q4_0"
    if num_groups == 1:
        return "int8"
    return "q8_0" if in_blocks_of_32 and scale_dtype == torch.float16 else None


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers from 0 on that are packed in words of 32 bits along a dimension, the first in the lowest bits.

    Args:
        words: int32 [R, C].
        bits: 8 or 4.
        dim: 0 or 1.

    Returns:
        uint8, of 32 / bits times as many rows (dim 0) or columns.
    """
    if dim == 0:
        return unpack(words.t(), bits, 1).t()
    numbers = words.contiguous().view(torch.uint8)  # little-endian
    if bits == 4:
        numbers = torch.stack((numbers & 0xF, numbers >> 4), -1).flatten(-2)
    return numbers


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, C / 8] in AWQ's order -> uint8 [R, C]."""
    numbers = unpack(words, 4, 1).view(len(words), -1, 8)
    return numbers[..., list(AWQ_PLACES)].flatten(1)
