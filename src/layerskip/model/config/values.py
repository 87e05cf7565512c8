"""Numbers and truth values of a config.json, each held to what it may be: a file may hold anything under any key."""

import math
from collections.abc import Mapping
from typing import Any

from layerskip.errors import CheckpointError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000


def read_size(raw: Mapping[str, Any], key: str, most: int = MAX_SIZE) -> int:
    """A required positive whole number.

    Raises:
        CheckpointError: It is missing, or isn't one.
    """
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CheckpointError(f"config.json: {key!r} must be a positive whole number up to {most}, got {shown(value)}")
    return value


def read_optional_size(raw: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number, or None where the file is silent or has null."""
    return None if raw.get(key) is None else read_size(raw, key)


def read_number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite number; the default where the file is silent or has null.

    Raises:
        CheckpointError: It isn't one, or is missing without a default.
    """
    value = default if raw.get(key) is None else raw[key]
    return check_number(f"{key!r}", value)


def check_number(name: str, value: object) -> float:
    """`value` if it is a positive finite number, or `CheckpointError`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {shown(value)}")
    return number


def read_flag(raw: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """A truth value; the default where the file is silent or has null.

    Raises:
        CheckpointError: It is something else.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key!r} must be true or false, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value for an error message, not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
