"""Checked numbers and booleans of a config.json, in which any key may have any value."""

import math
from collections.abc import Mapping
from typing import Any

from layerskip.errors import CheckpointError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000


def read_size(raw: Mapping[str, Any], key: str, most: int = MAX_SIZE) -> int:
    """Read a required positive whole number.

    Raises:
        CheckpointError: The value is missing or isn't a positive whole number.
    """
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CheckpointError(f"config.json: {key!r} must be a positive whole number up to {most}, got {shown(value)}")
    return value


def read_optional_size(raw: Mapping[str, Any], key: str) -> int | None:
    """Read a positive whole number; None if the key is missing or null."""
    return None if raw.get(key) is None else read_size(raw, key)


def read_number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a positive finite number; the default if the key is missing or null.

    Raises:
        CheckpointError: The value isn't a positive finite number, or is missing without a default.
    """
    value = default if raw.get(key) is None else raw[key]
    return check_number(f"{key!r}", value)


def check_number(name: str, value: object) -> float:
    """Return `value` if it is a positive finite number, or raise `CheckpointError`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {shown(value)}")
    return number


def read_flag(raw: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """Read a boolean; the default if the key is missing or null.

    Raises:
        CheckpointError: The value isn't a boolean.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key!r} must be true or false, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value for an error message, at most one line long."""
    try:
        text = repr(value)
    except ValueError:  # a number with more digits than Python converts to text
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
