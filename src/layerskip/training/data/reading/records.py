"""Records of files and data sets to documents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.reading.conversations import read_messages, read_tools
from layerskip.training.data.reading.documents import (
    ChatDocument,
    CompletionDocument,
    Document,
    InstructionDocument,
    TextDocument,
)

TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations")
# (task, what it is about, what does it): Alpaca's names and Dolly's.
INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"))
# (prompt, completion, what joins them). Answers follow in a new line, which belongs to what is learned: so a bare
# question is a good prompt afterwards.
PAIRS = (("prompt", "completion", ""), ("question", "answer", "\n"))
SHAPES = (
    "messages, conversations, instruction + input + output, text, content, prompt + completion, question + answer, or "
    "those of layerskip batch's results"
)


def read_record(record: object, text_field: str | None, origin: str) -> Iterator[Document]:
    """The document of a record; none if the record has nothing to learn.

    Conversations and instructions are looked for first, because their records often contain the whole text as well.

    Args:
        record: Names and values; a value of None counts as a missing name.
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
        yield from _text_or_messages(fields, text_field, origin)
        return
    for name in CHAT_FIELDS:
        if fields.get(name, "") != "":  # a table has all columns in each row
            yield from _chat(fields[name], fields, f"{origin}, {name}")
            return
    for names in INSTRUCTIONS:
        if names[0] in fields and names[2] in fields:
            yield from _instruction(fields, names, origin)
            return
    if {"index", "prompt"} <= fields.keys() and not fields.keys().isdisjoint({"finish_reason", "error"}):
        yield from _result(fields, origin)
        return
    for name in TEXT_FIELDS:
        if name in fields:
            yield from _text_or_messages(fields, name, origin)
            return
    for prompt_name, completion_name, joint in PAIRS:
        if prompt_name in fields and completion_name in fields:
            yield from _pair(fields, prompt_name, completion_name, joint, origin)
            return
    raise InvalidArgumentError(
        f"{origin} has {_names(fields)}, and none of {SHAPES}; name the field with the text: text_field"
    )


def _text_or_messages(fields: Mapping[str, Any], name: str, origin: str) -> Iterator[Document]:
    value = fields[name]
    if isinstance(value, str):
        if value.strip():
            yield TextDocument(origin=origin, text=value)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        yield from _chat(value, fields, f"{origin}, {name}")
    else:
        raise InvalidArgumentError(f"{origin}: field {name!r} must be a text or a list of messages, got {value!r:.80}")


def _pair(
    fields: Mapping[str, Any], prompt_name: str, completion_name: str, joint: str, origin: str
) -> Iterator[Document]:
    origin = f"{origin}, {prompt_name}"
    prompt, completion = fields[prompt_name], fields[completion_name]
    if isinstance(prompt, list) and isinstance(completion, list):  # some data sets split conversations in two
        yield from _chat([*prompt, *completion], fields, origin)
        return
    if not isinstance(prompt, str) or not isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise InvalidArgumentError(f"{origin}: prompt and completion must be texts, got {kinds}")
    if completion.strip():
        yield CompletionDocument(origin=origin, prompt=prompt, completion=joint + completion)


def _result(fields: Mapping[str, Any], origin: str) -> Iterator[Document]:
    """What `layerskip batch` has written: a prompt with the model's own answer, or an error in its place."""
    prompt, text = fields["prompt"], fields.get("text", "")
    if not isinstance(text, str) or not text.strip():
        return
    if isinstance(prompt, str):
        yield CompletionDocument(origin=origin, prompt=prompt, completion=text)
        return
    answer = {"role": "assistant", "content": text}
    yield ChatDocument(
        origin=origin, messages=(*read_messages(prompt, origin), answer), tools=read_tools(fields, origin)
    )


def _instruction(fields: Mapping[str, Any], names: tuple[str, str, str], origin: str) -> Iterator[Document]:
    texts = [fields.get(name, "") for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise InvalidArgumentError(f"{origin}: field {name!r} must be a text, got {text!r:.80}")
    document = InstructionDocument(
        origin=f"{origin}, {names[0]}", instruction=texts[0], input=texts[1], output=texts[2]
    )
    if not document.output.strip():
        return
    if not fields.get("system") and not fields.get("history"):
        yield document
        return
    before = _history(fields.get("history") or [], f"{origin}, history")
    messages = [*before, *document.conversation.messages]
    yield from _chat(messages, fields, document.origin)


def _history(value: object, origin: str) -> list[dict[str, str]]:
    """Earlier turns of an instruction: pairs of a question and its answer."""
    turns = value if isinstance(value, list) else [value]
    messages = []
    for turn in turns:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise InvalidArgumentError(f"{origin} must be a list of questions with their answers, got {turn!r:.80}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _chat(value: object, fields: Mapping[str, Any], origin: str) -> Iterator[Document]:
    messages = read_messages(value, origin)
    system = fields.get("system")
    if isinstance(system, str) and system and (not messages or messages[0]["role"] != "system"):
        messages = ({"role": "system", "content": system}, *messages)
    if any(message["role"] == "assistant" for message in messages):
        yield ChatDocument(origin=origin, messages=messages, tools=read_tools(fields, origin))


def _names(fields: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(repr, fields)) if fields else "no fields"
