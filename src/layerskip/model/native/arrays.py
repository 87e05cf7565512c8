"""Numbers of rows as arrays that calls of compiled code take, and what they give back by row."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")


def int64s(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array for a field of a call."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def int32s(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """An array for a field of a call."""
    return (ctypes.c_int32 * len(numbers))(*numbers)


def split(things: list[Thing], counts: Iterable[int]) -> list[list[Thing]]:
    """What belongs to each row, of a list of one row after the other; there may be more behind them."""
    parts, start = [], 0
    for count in counts:
        parts.append(things[start : start + count])
        start += count
    return parts
