"""Rotary position embeddings: parameters from config.json, and the tables of cosines and sines.

Shapes: T positions, R rotated channels of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config_values import check_number, read_flag, read_number, read_optional_size, shown

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

_SCALING_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_REQUIRED_KEYS: Mapping[str, set[str]] = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor"},
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one kind of layer."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    rotary_dim: int
    """Channels of each head that are rotated (the first ones)."""
    original_max_position_embeddings: int
    """Context length in tokens before scaling."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of `rope_type`, as config.json names them."""


def parse_rope(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    rope_theta: float,
    partial_rotary_factor: float,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None,
) -> RopeConfig:
    """Read one `rope_parameters` (or older `rope_scaling`) table; keys that aren't understood are errors.

    Args:
        parameters: The table, possibly empty.
        head_dim: Channels of a head.
        rope_theta: Base wavelength where the table names none.
        partial_rotary_factor: Rotated share of a head where the table names none.
        max_position_embeddings: The model's context in tokens.
        original_max_position_embeddings: The config's own top-level value, which wins over the table's.

    Raises:
        UnsupportedModelError: An unknown type or key.
        CheckpointError: A parameter is missing or makes no sense.
    """
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type  # its name in the first Phi-3 checkpoints
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type {shown(rope_type)} is not supported; supported types: {', '.join(ROPE_TYPES)}"
        )
    scaling = {k: v for k, v in parameters.items() if k not in _COMMON_KEYS and v is not None}
    unknown = sorted(set(scaling) - _SCALING_KEYS[rope_type])
    if unknown:
        raise UnsupportedModelError(
            f"rope parameter {unknown[0]!r} is not understood for rope_type {rope_type!r}; "
            f"understood: {', '.join(sorted(_SCALING_KEYS[rope_type] | _COMMON_KEYS))}"
        )
    original = (
        original_max_position_embeddings
        or read_optional_size(parameters, "original_max_position_embeddings")
        or max_position_embeddings
    )
    rotary_dim = int(head_dim * min(read_number(parameters, "partial_rotary_factor", partial_rotary_factor), 2.0))
    _check_values(rope_type, scaling, rotary_dim, head_dim)
    if rope_type == "longrope" or (rope_type == "yarn" and scaling.get("factor") is None):
        scaling.setdefault("factor", max_position_embeddings / original)
    return RopeConfig(
        rope_type=rope_type,
        rope_theta=read_number(parameters, "rope_theta", rope_theta),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=int(original),
        scaling=scaling,
    )


def _check_values(rope_type: str, scaling: Mapping[str, Any], rotary_dim: int, head_dim: int) -> None:
    """Raise `CheckpointError` where a parameter is missing, isn't a number, or is a list of the wrong length."""
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise CheckpointError(
            f"config.json: {rotary_dim} rotated channels of {head_dim} in a head; they must be even in number and 2 or "
            "more (partial_rotary_factor sets their share)"
        )
    missing = sorted(_REQUIRED_KEYS.get(rope_type, set()) - set(scaling))
    if missing:
        raise CheckpointError(f"config.json: rope parameter {missing[0]!r} is missing for rope_type {rope_type!r}")
    for key, value in scaling.items():
        numbers = value if isinstance(value, list) else [value]
        wanted = rotary_dim // 2 if key in ("short_factor", "long_factor") else 1
        if key == "truncate":
            read_flag(scaling, key)
            continue
        if len(numbers) != wanted:
            raise CheckpointError(f"config.json: rope parameter {key!r} must be {wanted} numbers, got {shown(value)}")
        for number in numbers:
            check_number(f"rope parameter {key!r}", number)
    if rope_type == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise CheckpointError("config.json: rope parameter 'high_freq_factor' must be larger than 'low_freq_factor'")


class RopeTable:
    """Cosines and sines of every position, ready for `rotate`.

    `sin` carries the sign of the rotation's first half, so that rotating needs one roll, one product and one
    fused multiply-add.
    """

    def __init__(self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the tables.

        Args:
            config: The rotary embedding.
            context: Positions to cover (tokens). For `longrope` it also chooses the factors: the long ones where
                the context exceeds the original one, as other engines do.
            dtype: Dtype of the tables; they are computed in float32.
            device: Where they live.
        """
        frequencies, scale = inverse_frequencies(config, context)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.rotary_dim = config.rotary_dim
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)  # [T, R]
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)  # [T, R]


def rope_bytes(config: RopeConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of a `RopeTable`."""
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
    """Angular step per position of each channel pair, and the factor on cosines and sines.

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
