"""Text from files, standard input and the command line, checked to be text."""

from pathlib import Path

from layerskip.errors import InvalidArgumentError, PromptError


def read_text_file(flag: str, file: Path) -> str:
    """A file's text, without one line break at its end.

    Raises:
        InvalidArgumentError: It can't be read.
        PromptError: It is empty, or isn't UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{flag} {file}: {error.strerror}") from error
    return to_text(drop_line_break(content), f"the text in {file}")


def drop_line_break(content: bytes) -> bytes:
    """Content without one line break at its end."""
    return content.removesuffix(b"\n").removesuffix(b"\r")


def to_text(content: bytes | str, name: str) -> str:
    """Content as text.

    Args:
        content: Bytes, or what Python made of bytes on the command line or at the terminal.
        name: What an error calls it.

    Raises:
        PromptError: It is empty, or isn't UTF-8.
    """
    try:
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        text = content.decode("utf-8")
    except UnicodeError as error:
        raise PromptError(f"{name} is not UTF-8: {error}; convert it, or correct it there") from error
    if not text:
        raise PromptError(f"{name} is empty; give at least one character")
    return text
