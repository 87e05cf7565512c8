"""Checks of numbers that a user gives: Python's own, or numpy's."""

import math
from collections.abc import Callable
from numbers import Real
from operator import index

from layerskip.errors import InvalidArgumentError, PromptError


def whole_number(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """A whole number in a range, as Python's own kind.

    Args:
        name: What an error calls it.
        value: What was given.
        least: Smallest that is allowed.
        most: Largest that is allowed; no limit if not given.

    Raises:
        InvalidArgumentError: It isn't one.
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
    """A finite number, as Python's own kind.

    Args:
        name: What an error calls it.
        value: What was given.
        allowed: What is allowed, in words.
        check: Whether a number is allowed.

    Raises:
        InvalidArgumentError: It isn't one, or isn't allowed.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not check(number):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}")
    return number


def check_text(text: str, name: str) -> None:
    """Raise `PromptError` unless a text is one that tokenizers take: whole characters only."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has half a character, {text[error.start]!a}, at position {error.start}: a lone surrogate, which "
            "no tokenizer takes; correct the text where it comes from (in JSON, \\ud83d needs its other half beside "
            "it), or replace such halves: text.encode(errors='replace').decode()"
        ) from error
