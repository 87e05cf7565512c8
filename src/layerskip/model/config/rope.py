"""Parameters of rotary position embeddings, read strictly from config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config.values import check_number, read_flag, read_number, read_optional_size, shown

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
    """Number of channels of each head that are rotated, from the first on."""
    original_max_position_embeddings: int
    """Tokens of the context before scaling."""
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
    """Read one `rope_parameters` (or older `rope_scaling`) table; unknown keys are errors.

    Args:
        parameters: The table, possibly empty.
        head_dim: Channels of a head.
        rope_theta: Base wavelength if the table names none.
        partial_rotary_factor: Rotated share of a head if the table names none.
        max_position_embeddings: The model's context in tokens.
        original_max_position_embeddings: The top-level value of config.json, which takes precedence over the table's.

    Raises:
        UnsupportedModelError: An unknown type or key.
        CheckpointError: A parameter is missing or invalid.
    """
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type  # the type's name in the first Phi-3 checkpoints
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
    """Raise `CheckpointError` if a parameter is missing, isn't a number, or is a list of the wrong length."""
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
