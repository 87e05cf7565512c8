"""Weights in blocks that the gguf package reads but doesn't write: Q4_K, Q5_K, Q6_K.

Scales are chosen simply, not as well as llama.cpp does: what matters is that blocks are valid and near the numbers.
"""

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize as quantize_of_package

SUPER, GROUP = 256, 32


def quantize(weight: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """[..., I] -> [..., bytes of a row], uint8, in any type that GGUF files may have here."""
    writers = {
        GGMLQuantizationType.Q4_K: lambda blocks: with_minima(blocks, 4),
        GGMLQuantizationType.Q5_K: lambda blocks: with_minima(blocks, 5),
        GGMLQuantizationType.Q6_K: six_bits,
    }
    if type_ not in writers:
        return quantize_of_package(weight, type_)
    blocks = weight.astype(np.float32).reshape(-1, SUPER)
    return writers[type_](blocks).reshape(*weight.shape[:-1], -1)


def with_minima(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Q4_K or Q5_K of [N, 256]: scale and minimum, six bits of each for each group, numbers."""
    groups = blocks.reshape(-1, SUPER // GROUP, GROUP)
    lows = -np.minimum(groups.min(-1), 0)  # what is subtracted
    steps = (groups.max(-1) + lows) / (2**bits - 1)
    scale, minimum = (half(part.max(-1, keepdims=True) / 63) for part in (steps, lows))
    small_scales, small_minima = (whole(part, unit, 0, 63) for part, unit in ((steps, scale), (lows, minimum)))
    numbers = whole(groups + (minimum * small_minima)[..., None], (scale * small_scales)[..., None], 0, 2**bits - 1)
    pairs = numbers.reshape(-1, SUPER // GROUP // 2, 2, GROUP)
    low = (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(blocks), -1)
    parts = [as_bytes(scale), as_bytes(minimum), six_bit_pairs(small_scales, small_minima)]
    if bits == 5:
        fifth = (numbers >> 4) << np.arange(SUPER // GROUP, dtype=np.uint8)[:, None]
        parts.append(np.bitwise_or.reduce(fifth, axis=1))
    return np.concatenate([*parts, low], axis=-1)


def six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits in twelve bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=-1)


def six_bits(blocks: np.ndarray) -> np.ndarray:
    """Q6_K of [N, 256]: numbers, a whole number for each 16 of them, the scale that this is multiplied by."""
    groups = blocks.reshape(-1, 16, 16)
    steps = np.abs(groups).max(-1) / 31
    scale = half(steps.max(-1, keepdims=True) / 127)
    small = whole(steps, scale, 0, 127)
    numbers = (whole(groups, (scale * small)[..., None], -32, 31, np.int8) + 32).astype(np.uint8)
    quarters = numbers.reshape(len(blocks), 2, 4, GROUP)
    low = quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce((quarters >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)
    parts = [low.reshape(len(blocks), -1), high.reshape(len(blocks), -1), small, as_bytes(scale)]
    return np.concatenate(parts, axis=-1)


def half(numbers: np.ndarray) -> np.ndarray:
    """Rounded to float16."""
    return numbers.astype(np.float16).astype(np.float32)


def as_bytes(numbers: np.ndarray) -> np.ndarray:
    """[..., n] -> [..., 2 n], as float16."""
    return numbers.astype(np.float16).view(np.uint8)


def whole(numbers: np.ndarray, step: np.ndarray, least: int, most: int, dtype: type = np.uint8) -> np.ndarray:
    """The nearest multiples of a step, within bounds; 0 where the step is."""
    scaled = np.divide(numbers, step, out=np.zeros_like(numbers), where=np.broadcast_to(step, numbers.shape) != 0)
    return np.clip(np.rint(scaled), least, most).astype(dtype)
