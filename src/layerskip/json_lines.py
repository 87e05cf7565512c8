"""Text files and JSON lines, read in the same way by every command.

Only real line ends count: JSON strings may contain characters like U+2028 and U+0085, at which Python's `splitlines`
would split.
"""

from collections.abc import Iterator
from pathlib import Path

from layerskip.errors import InvalidArgumentError


def read_utf8(path: Path, name: str = "") -> str:
    """Contents of a UTF-8 text file, without a byte order mark.

    Args:
        path: The file.
        name: Name in errors, before the path, such as the option that the path comes from.

    Raises:
        InvalidArgumentError: The file can't be read, or isn't UTF-8.
    """
    shown = f"{name} {path}".strip()
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidArgumentError(f"{shown} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{shown} is not UTF-8: {error}; convert it") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that aren't blank, each with its number in the file, counted from 1."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")
