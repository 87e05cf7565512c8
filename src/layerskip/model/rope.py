"""Rotary position embeddings: tables of cosines and sines, and the rotation.

Shapes: T positions, R rotated channels of a head.
"""

import math

import torch
from torch import Tensor

from layerskip.model.config.rope import RopeConfig


class RopeTable:
    """Cosines and sines of every position, in the form that `rotate` takes.

    `sin` includes the sign of the rotation's first half, so that a rotation takes one roll, one product and one fused
    multiply-add.
    """

    def __init__(self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the tables.

        Args:
            config: The rotary embedding.
            context: Number of positions. For `longrope` it also selects the factors: the long ones if the context
                exceeds the original one, as in other engines.
            dtype: Dtype of the tables; they are computed in float32.
            device: Device of the tables.
        """
        frequencies, scale = inverse_frequencies(config, context)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.rotary_dim = config.rotary_dim
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)  # [T, R]
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)  # [T, R]


def rope_bytes(config: RopeConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes that a `RopeTable` takes."""
    return 2 * context * config.rotary_dim * dtype.itemsize


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of each head.

    Args:
        x: [B, Q, H, D_head].
        cos: [B or 1, Q, 1, R].
        sin: [B or 1, Q, 1, R], signed (see `RopeTable`).
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(rotary_dim // 2, -1), sin)
    rotated = x[..., :rotary_dim]
    rotated = torch.addcmul(rotated * cos, rotated.roll(rotary_dim // 2, -1), sin)
    return torch.cat((rotated, x[..., rotary_dim:]), -1)


def inverse_frequencies(config: RopeConfig, context: int) -> tuple[Tensor, float]:
    """Angle for each position and pair of channels, and the factor on cosines and sines.

    Returns:
        Frequencies [R / 2] in radians a token, float32; and the attention factor.

    Source: arXiv:2104.09864 (RoPE); arXiv:2306.15595 (linear); arXiv:2309.00071 (YaRN); arXiv:2402.13753 (LongRoPE);
        the `llama3` scheme: arXiv:2407.21783 and its model configuration.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    base = torch.pow(config.rope_theta, exponents)
    match config.rope_type:
        case "linear":
            return 1.0 / base / config.scaling["factor"], 1.0
        case "llama3":
            return _llama3(1.0 / base, config), 1.0
        case "yarn":
            return _yarn(base, config)
        case "longrope":
            return _longrope(base, config, context)
        case _:
            return 1.0 / base, 1.0


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    s = config.scaling
    low, high = float(s["low_freq_factor"]), float(s["high_freq_factor"])
    turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / float(s["factor"]) + smooth * frequencies


def _yarn(base: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    s = config.scaling
    factor = float(s["factor"])
    dim = config.rotary_dim

    def channel_with_turns(turns: float) -> float:
        wavelengths = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low = channel_with_turns(float(s.get("beta_fast") or 32))
    high = channel_with_turns(float(s.get("beta_slow") or 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = interpolated / (factor * base) + (1 - interpolated) / base

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = s.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = s.get("mscale"), s.get("mscale_all_dim")
        attention_factor = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return frequencies, float(attention_factor)


def _longrope(base: Tensor, config: RopeConfig, context: int) -> tuple[Tensor, float]:
    s = config.scaling
    original = config.original_max_position_embeddings
    factors = torch.tensor(s["long_factor"] if context > original else s["short_factor"], dtype=torch.float32)
    attention_factor = s.get("attention_factor")
    if attention_factor is None:
        factor = float(s["factor"])
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (factors * base), float(attention_factor)
