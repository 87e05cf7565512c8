"""Prompts from a file of JSON lines."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from layerskip.batch.results import Record
from layerskip.errors import InvalidArgumentError
from layerskip.files import parse_json
from layerskip.json_lines import numbered_lines, read_utf8


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the input."""

    index: int
    """Its place among the lines that aren't blank."""
    fields: Record
    """What its record starts with: `index`, its own `id` if it has one, and the prompt."""
    error: str | None = None
    """Why it can't be decoded, where that shows without a model."""

    @property
    def size(self) -> int:
        """About how long its prompt is: characters."""
        prompt = self.fields["prompt"]
        return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


def read_lines(path: Path, field: str = "prompt") -> tuple[list[Line], str]:
    """Lines of a file with a JSON object each; blank ones don't count.

    Args:
        path: The file.
        field: Name of the field that holds the prompt: a text, or a list of chat messages (`role` and `content`).

    Returns:
        The lines, and a hash of the file's content (SHA-256). A line that is no such object has an `error`.

    Raises:
        InvalidArgumentError: The file can't be read or has no lines, or none of them has the field.
    """
    text = read_utf8(path, "input")
    texts = [line for _, line in numbered_lines(text)]
    if not texts:
        raise InvalidArgumentError(f"input {path} has no lines; give a JSON object with a {field!r} on each")
    lines = [_read_line(index, line, field) for index, line in enumerate(texts)]
    if all("prompt" not in line.fields for line in lines):
        raise InvalidArgumentError(f"input {path}: {lines[0].error}, and so on; name the prompt's field with --field")
    return lines, hashlib.sha256(path.read_bytes()).hexdigest()


def _read_line(index: int, text: str, field: str) -> Line:
    fields: Record = {"index": index}

    def wrong(why: str) -> Line:
        return Line(index=index, fields=fields, error=f"prompt {index} {why}")

    try:
        record = parse_json(text)
        json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half a character, which isn't text
    except UnicodeEncodeError as error:
        return wrong(f"spells half a character: {error}")
    except (ValueError, RecursionError) as error:
        return wrong(f"is not JSON: {error}")
    if not isinstance(record, dict):
        return wrong(f"must be a JSON object, got a {type(record).__name__}")
    if "id" in record:
        fields["id"] = record["id"]
    if field not in record:
        return wrong(f"has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    fields["prompt"] = prompt = record[field]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        kind = type(prompt).__name__
        return wrong(f"must be a text, or a list of messages that have a 'role' and a 'content', got a {kind}")
    return Line(index=index, fields=fields) if prompt else wrong("is empty; give at least one character")


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in prompt
    )
