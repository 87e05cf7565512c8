"""Checks of arguments that a user gives; numbers may be Python's or numpy's."""

import math
import re
from collections.abc import Callable
from numbers import Real
from operator import index

from layerskip.errors import InvalidArgumentError, PromptError


def whole_number(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return a whole number in a range as a Python `int`.

    Args:
        name: Name in errors.
        value: The value given.
        least: Smallest allowed value.
        most: Largest allowed value; no limit if not given.

    Raises:
        InvalidArgumentError: The value isn't a whole number, or isn't in the range.
    """
    allowed = f"a whole number of at least {least}" + (f" and at most {most}" if most is not None else "")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)  # type: ignore[arg-type]  # a TypeError is what this is about
    except TypeError:
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}")
    return number


def finite_number(name: str, value: object, allowed: str, check: Callable[[float], bool]) -> float:
    """Return a finite number as a Python `float`.

    Args:
        name: Name in errors.
        value: The value given.
        allowed: The allowed range, in words.
        check: Returns whether a number is in this range.

    Raises:
        InvalidArgumentError: The value isn't a finite number, or isn't in the range.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not check(number):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}")
    return number


def check_text(text: str, name: str) -> None:
    """Raise `PromptError` if a text has half a surrogate pair, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has half a character, {text[error.start]!a}, at position {error.start}: a lone surrogate, which "
            "no tokenizer takes; correct the text where it comes from (in JSON, \\ud83d needs its other half beside "
            "it), or replace such halves: text.encode(errors='replace').decode()"
        ) from error


def memory_size(name: str, value: str) -> int:
    """Bytes of a size such as 20GiB, 20GB, 512 MiB or 1000000.

    Raises:
        InvalidArgumentError: It is no such size, or none at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise InvalidArgumentError(f"{name} must be a size such as 20GiB or 512MiB, got {value!r}")
    power = " KMGT".index(match[2].upper() or " ")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise InvalidArgumentError(f"{name} must be more than nothing, got {value!r}")
    return size
