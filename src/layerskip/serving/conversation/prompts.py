"""Conversations with functions, calls and results as messages that a chat template takes."""

import json
from collections.abc import Sequence
from typing import Any

from layerskip.serving.conversation.formats import HERMES, LLAMA, MISTRAL
from layerskip.serving.conversation.styles import ToolStyle
from layerskip.serving.conversation.tools import Function, ToolUse

Message = dict[str, Any]


def templated(
    messages: Sequence[Message], style: ToolStyle, tools: ToolUse | None
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """What the chat template is given.

    Args:
        messages: The conversation, with calls and results in the shape that transformers has for them.
        style: What the template can do.
        tools: What the model may call.

    Returns:
        Messages, and descriptions of tools if the template writes these itself.
    """
    described = None if tools is None else [function.described for function in tools.functions]
    if style.is_native:
        if style.form.name == MISTRAL.name:
            return _short_ids(messages), described
        return (_single_calls(messages) if style.form.name == LLAMA.name else list(messages)), described
    written = _written(messages)
    if tools is not None:
        written = _with_instruction(written, instruction(tools.functions), has_system=style.has_system)
    return written, None


def instruction(functions: Sequence[Function]) -> str:
    """What a model is told of functions where its template has no words for them."""
    listed = "\n".join(json.dumps(function.described, ensure_ascii=False) for function in functions)
    return (
        "# Tools\n\nYou may call one or more functions to help with the user's request. Their signatures are given as "
        f"JSON within <tools></tools>:\n<tools>\n{listed}\n</tools>\n\nTo call a function, write a JSON object with "
        'its name and its arguments within <tool_call></tool_call>:\n<tool_call>\n{"name": <name of the function>, '
        '"arguments": <object with its arguments>}\n</tool_call>\nResults come within '
        "<tool_response></tool_response>."
    )


def _with_instruction(messages: Sequence[Message], text: str, *, has_system: bool) -> list[Message]:
    """Messages whose system message ends with a text; without system messages, the user's first one begins with it."""
    first, *rest = messages
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    if has_system:
        return [{"role": "system", "content": text}, *messages]
    for place, message in enumerate(messages):
        if message["role"] == "user":
            changed = {**message, "content": f"{text}\n\n{message['content']}"}
            return [*messages[:place], changed, *messages[place + 1 :]]
    return [{"role": "user", "content": text}, *messages]


def _written(messages: Sequence[Message]) -> list[Message]:
    """Calls and results as text; results that follow each other are one message of the user."""
    made: list[Message] = []
    is_result = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if is_result:
                made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n{text}"}
            else:
                made.append({"role": "user", "content": text})
        elif "tool_calls" in message:
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
            text = "\n".join(filter(None, (message["content"], HERMES.write(calls))))
            made.append({"role": message["role"], "content": text})
        else:
            made.append(message)
        is_result = message["role"] == "tool"
    return made


def _short_ids(messages: Sequence[Message]) -> list[Message]:
    """Messages whose calls are named by nine letters and digits, as Mistral's templates want it."""
    short: dict[str, str] = {}

    def shorten(given: Any) -> str:
        return short.setdefault(str(given), f"call{len(short):05d}")

    made = []
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in message:
            changed["tool_call_id"] = shorten(message["tool_call_id"])
        if "tool_calls" in message:
            changed["tool_calls"] = [{**call, "id": shorten(call["id"])} for call in message["tool_calls"]]
        made.append(changed)
    return made


def _single_calls(messages: Sequence[Message]) -> list[Message]:
    """Messages with one call each, with its result behind it: Llama's templates take no more."""
    results = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    made: list[Message] = []
    moved: set[int] = set()
    for message in messages:
        if len(message.get("tool_calls", ())) < 2:
            if id(message) not in moved:
                made.append(message)
            continue
        for place, call in enumerate(message["tool_calls"]):
            made.append({**message, "content": "" if place else message["content"], "tool_calls": [call]})
            result = results.get(call["id"])
            if result is not None and id(result) not in moved:
                made.append(result)
                moved.add(id(result))
    return made
