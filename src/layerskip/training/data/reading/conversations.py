"""Conversations and tools from the formats of data sets to the format of chat templates."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.errors import InvalidArgumentError

Message = Mapping[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "function_call": "assistant",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""Speakers in ShareGPT's records (`from`), and their roles in chat templates."""


def read_messages(value: object, origin: str) -> tuple[Message, ...]:
    """The messages of a conversation, with a text as content.

    Accepts `role` and `content` (a text, or a list of parts that are texts), and ShareGPT's `from` and `value`. A list
    may be JSON in a string, as in a CSV file.

    Args:
        value: The record's value.
        origin: Where it is from, for error messages.

    Raises:
        InvalidArgumentError: The value is no list of messages, or one of them isn't a message; the message names it.
    """
    value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidArgumentError(f"{origin} must be a list of messages, got {value!r:.80}")
    return tuple(_message(message, f"{origin}[{index}]") for index, message in enumerate(value))


def read_tools(record: Mapping[str, Any], origin: str) -> tuple[Mapping[str, Any], ...]:
    """The functions that a record's assistant may call: `tools`, or the older `functions`.

    Raises:
        InvalidArgumentError: The value is no list of descriptions.
    """
    name = "tools" if record.get("tools") else "functions"
    value = _parsed(record.get(name) or [])
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise InvalidArgumentError(
            f"{origin}, {name} must be a list of JSON schemas of functions, got {value!r:.80}; correct or remove it"
        )
    if name == "functions":
        return tuple({"type": "function", "function": dict(tool)} for tool in value)
    return tuple(dict(tool) for tool in value)


def without_nulls(value: Any) -> Any:
    """A record of a table without the names that have no value.

    In a table, every object has the fields of all others, for example a tool's parameters the fields of all tools.
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _parsed(value: object) -> object:
    """The value of JSON in a string; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed


def _message(message: object, origin: str) -> Message:
    given: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    fields = {name: value for name, value in given.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = _from_sharegpt(fields, origin)
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(fields["content"], origin)
    if fields.get("tool_calls"):
        fields["tool_calls"] = [_call(call, origin) for call in _list(fields["tool_calls"], origin)]
    role, content = fields.get("role"), fields.get("content")
    # A message that calls a tool may say nothing.
    says = isinstance(content, str) or (content is None and bool(fields.get("tool_calls")))
    if not isinstance(role, str) or not role or not says:
        raise InvalidArgumentError(
            f'{origin} must be a message such as {{"role": "user", "content": "Hello"}}, got {message!r:.80}'
        )
    return fields


def _from_sharegpt(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    speaker, value = fields["from"], fields.get("value")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(value, str):
        raise InvalidArgumentError(
            f'{origin} must be a message such as {{"from": "human", "value": "Hello"}}, said by one of '
            f"{', '.join(SHAREGPT_ROLES)}; got {dict(fields)!r:.80}"
        )
    rest = {name: item for name, item in fields.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {**rest, "role": role, "content": value}
    return {**rest, "role": role, "tool_calls": _list(_parsed(value), origin)}


def _joined(parts: Sequence[object], origin: str) -> str:
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise InvalidArgumentError(
                f"{origin} has content of the type {kind or type(part).__name__!r}, and only text can be learned; "
                "remove this part, or the conversation"
            )
        texts.append(text)
    return "".join(texts)


def _list(value: object, origin: str) -> list[Any]:
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidArgumentError(
            f'{origin} must call tools such as {{"name": "add", "arguments": {{"a": 1}}}}, got {value!r:.80}'
        )
    return calls


def _call(call: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A call whose arguments are an object: templates render them as JSON, and would quote a string once more."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], origin)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{origin}: a tool's arguments must be JSON, got {arguments!r:.80}") from error
        return {**call, "arguments": parsed}
    return dict(call)
