"""Prompts from files: plain text, or JSON lines with a named field."""

from pathlib import Path

from layerskip.errors import InvalidArgumentError
from layerskip.files import parse_json
from layerskip.json_lines import numbered_lines, read_utf8


def read_text(path: Path) -> str:
    """Contents of a UTF-8 text file.

    Raises:
        InvalidArgumentError: The file can't be read, or is empty.
    """
    text = read_utf8(path)
    if not text.strip():
        raise InvalidArgumentError(f"{path} is empty; give a file with text")
    return text


def read_prompts(path: Path, *, field: str | None = None, limit: int | None = None) -> list[str]:
    """Prompts of a file: one for each line of a `.jsonl` file, or else the whole text as one.

    Args:
        path: The file.
        field: Name of the field with the prompt, in a `.jsonl` file.
        limit: Number of prompts to read, at most.

    Raises:
        InvalidArgumentError: The file can't be read, has no prompts, or lines without that field.
    """
    text = read_text(path)
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"limit must be at least 1, got {limit}")
    if path.suffix != ".jsonl":
        if field is not None:
            raise InvalidArgumentError(f"field {field!r} needs a .jsonl file, and {path} is none; leave the field out")
        return [text]
    prompts: list[str] = []
    for number, line in numbered_lines(text):
        if limit is not None and len(prompts) == limit:
            break
        prompts.append(_field(line, field or "prompt", f"{path}, line {number}"))
    return prompts


def _field(line: str, field: str, where: str) -> str:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise InvalidArgumentError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or field not in record:
        there = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise InvalidArgumentError(f"{where} has no field {field!r}; it has {there}: name one with the field option")
    value = record[field]
    if not isinstance(value, str) or not value:
        raise InvalidArgumentError(f"{where}: field {field!r} must be a text that isn't empty, got {value!r}")
    return value
