"""Messages of a request as chat templates want them."""

import json
from collections.abc import Sequence
from typing import Any

from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.requests import MessageBody, TextPart, ToolCall


def to_messages(given: Sequence[MessageBody]) -> list[dict[str, Any]]:
    """Conversations as templates of transformers read them: content as one text, arguments of calls as objects.

    Raises:
        ApiError: A message says nothing.
    """
    messages = []
    for place, message in enumerate(given):
        content = plain_text(message.content if message.content is not None else message.refusal)
        if content is None and not message.tool_calls:
            raise ApiError(
                400, f"messages[{place}] has no content", param=f"messages[{place}].content", code="invalid_value"
            )
        made: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": content or "",
        }
        if message.name is not None:
            made["name"] = message.name
        if message.tool_call_id is not None:
            made["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            made["tool_calls"] = [_call(call, f"messages[{place}].tool_calls") for call in message.tool_calls]
        messages.append(made)
    return messages


def plain_text(content: str | Sequence[TextPart] | None) -> str | None:
    """A message's parts as one text."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text or part.refusal or "" for part in content)


def read_arguments(given: str, param: str) -> dict[str, Any]:
    """Arguments of a call that was made earlier.

    Args:
        given: As JSON; empty for none.
        param: Where they stand in the request.

    Raises:
        ApiError: They aren't an object of JSON.
    """
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        message = f"arguments of a call must be a JSON object, got {given[:80]!r}"
        raise ApiError(400, message, param=param, code="invalid_value")
    return arguments


def _call(call: ToolCall, param: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": read_arguments(call.function.arguments, param)}
    return {"id": call.id, "type": "function", "function": function}
