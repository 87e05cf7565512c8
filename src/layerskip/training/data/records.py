"""Records of JSON lines and data sets -> documents."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.documents import ChatDocument, CompletionDocument, Document, TextDocument

TEXT_FIELDS = ("text", "content")
MESSAGES_FIELD = "messages"
# (prompt, completion, what joins them). Answers follow in a new line, which belongs to what is learned: so a bare
# question is a good prompt afterwards.
PAIRS = (("prompt", "completion", ""), ("question", "answer", "\n"))
SHAPES = "text, content, prompt + completion, question + answer, or messages"


def read_json_lines(path: Path, text_field: str | None) -> Iterator[Document]:
    """Documents of a .jsonl file, one a line; empty lines and empty texts are left out.

    Raises:
        InvalidArgumentError: The file can't be read, or a line isn't such a record; names the line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from read_record(_parse(line, f"{path}, line {number}"), text_field, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} can't be read as UTF-8 JSON lines: {error}") from error


def read_record(record: object, text_field: str | None, origin: str) -> Iterator[Document]:
    """The document of a record, or none where there is nothing to learn.

    Args:
        record: Names and values; a value of None is as if the name weren't there.
        text_field: Field with the text or the messages; None to look for the usual ones.
        origin: File and line, or data set and number, for error messages.

    Raises:
        InvalidArgumentError: The record has none of these fields, or a value of another type.
    """
    if not isinstance(record, Mapping):
        raise InvalidArgumentError(f"{origin} must be a JSON object with fields, got a {type(record).__name__}")
    fields = {str(name): value for name, value in record.items() if value is not None}
    if text_field is not None:
        if text_field not in fields:
            raise InvalidArgumentError(f"{origin} has no field {text_field!r}; it has {_names(fields)}")
        yield from _text_or_messages(fields[text_field], text_field, origin)
        return
    for name in TEXT_FIELDS:
        if name in fields:
            yield from _text_or_messages(fields[name], name, origin)
            return
    for prompt_name, completion_name, joint in PAIRS:
        if prompt_name in fields and completion_name in fields:
            yield from _pair(fields[prompt_name], fields[completion_name], joint, f"{origin}, {prompt_name}")
            return
    if MESSAGES_FIELD not in fields:
        raise InvalidArgumentError(
            f"{origin} has {_names(fields)}, and none of {SHAPES}; name the field with the text: text_field"
        )
    yield from _chat(fields[MESSAGES_FIELD], f"{origin}, {MESSAGES_FIELD}")


def _parse(line: str, origin: str) -> object:
    try:
        record: object = json.loads(line)
        if "\\u" in line:  # JSON can spell half a character, which isn't text for anything that comes after
            json.dumps(record, ensure_ascii=False).encode()
    except ValueError as error:
        raise InvalidArgumentError(f"{origin} is not JSON in UTF-8: {error}; correct or remove the line") from error
    return record


def _text_or_messages(value: object, name: str, origin: str) -> Iterator[Document]:
    if isinstance(value, str):
        if value.strip():
            yield TextDocument(origin=origin, text=value)
    elif isinstance(value, Sequence):
        yield from _chat(value, f"{origin}, {name}")
    else:
        raise InvalidArgumentError(f"{origin}: field {name!r} must be a text or a list of messages, got {value!r:.80}")


def _pair(prompt: object, completion: object, joint: str, origin: str) -> Iterator[Document]:
    if isinstance(prompt, list) and isinstance(completion, list):  # some data sets split conversations in two
        yield from _chat([*prompt, *completion], origin)
        return
    if not isinstance(prompt, str) or not isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise InvalidArgumentError(f"{origin}: prompt and completion must be texts, got {kinds}")
    if completion.strip():
        yield CompletionDocument(origin=origin, prompt=prompt, completion=joint + completion)


def _chat(messages: object, origin: str) -> Iterator[Document]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidArgumentError(f"{origin} must be a list of messages, got {messages!r:.80}")
    checked = tuple(_message(message, f"{origin}[{index}]") for index, message in enumerate(messages))
    if any(message["role"] == "assistant" for message in checked):
        yield ChatDocument(origin=origin, messages=checked)


def _message(message: object, origin: str) -> Mapping[str, Any]:
    given: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    fields = {name: value for name, value in given.items() if value is not None}
    role, content = fields.get("role"), fields.get("content")
    # A message that calls a tool may say nothing.
    says = isinstance(content, str) or (content is None and bool(fields.get("tool_calls")))
    if not isinstance(role, str) or not role or not says:
        raise InvalidArgumentError(
            f'{origin} must be a message such as {{"role": "user", "content": "Hello"}}, got {message!r:.80}'
        )
    return fields


def _names(fields: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(repr, fields)) if fields else "no fields"
