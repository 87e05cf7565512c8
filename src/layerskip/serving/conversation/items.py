"""The input of `/v1/responses` as messages and tools."""

from collections.abc import Sequence
from typing import Any

from layerskip.serving.config import RequestLimits
from layerskip.serving.conversation.messages import plain_text, read_arguments
from layerskip.serving.conversation.tools import Function, ToolUse, make_tools
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.responses import (
    AllowedFunctionTools,
    CallItem,
    CallOutputItem,
    FunctionTool,
    InputItem,
    MessageItem,
    NamedFunctionTool,
    OtherItem,
    ResponsesBody,
)

Message = dict[str, Any]


def input_messages(given: str | Sequence[InputItem], instructions: str | None) -> list[Message]:
    """A conversation as chat templates of transformers read it.

    Instructions come first, as the system message; system messages that follow are parts of it. Calls belong to the
    assistant's message before them.

    Args:
        given: A question, or all that was said and done so far.
        instructions: What the model is to heed.

    Raises:
        ApiError: There is nothing, or an item isn't supported.
    """
    messages: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    names: dict[str, str] = {}
    for place, item in enumerate(given):
        match item:
            case MessageItem():
                _add_message(messages, item)
            case CallItem():
                names[item.call_id] = item.name
                _add_call(messages, item, f"input[{place}].arguments")
            case CallOutputItem():
                result = {"role": "tool", "tool_call_id": item.call_id, "content": plain_text(item.output) or ""}
                messages.append({**result, "name": names[item.call_id]} if item.call_id in names else result)
            case OtherItem():
                message = f"input[{place}] is of a type that isn't supported: {str(item.type)[:80]!r}; leave it out"
                raise ApiError(400, message, param=f"input[{place}]", code="unsupported_value")
    if not any(message["role"] != "system" for message in messages):
        raise ApiError(400, "input has no message; give at least one", param="input", code="invalid_value")
    return messages


def _add_message(messages: list[Message], item: MessageItem) -> None:
    role = "system" if item.role == "developer" else item.role
    content = plain_text(item.content) or ""
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{content}"}
    else:
        messages.append({"role": role, "content": content})


def _add_call(messages: list[Message], item: CallItem, param: str) -> None:
    function = {"name": item.name, "arguments": read_arguments(item.arguments, param)}
    call = {"id": item.call_id, "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def response_tools(body: ResponsesBody, limits: RequestLimits) -> ToolUse | None:
    """The functions of a request; tools of other kinds are ignored. None if none may be called.

    Raises:
        ApiError: Too many or too large, two of one name, or a choice that isn't among them.
    """
    functions = [
        Function(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters,
            param=f"tools[{place}].parameters",
        )
        for place, tool in enumerate(body.tools or ())
        if isinstance(tool, FunctionTool)
    ]
    match body.tool_choice:
        case NamedFunctionTool(name=name):
            return make_tools(functions, "required", [name], body.parallel_tool_calls, limits)
        case AllowedFunctionTools(mode=mode, tools=tools):
            names = [tool.name for tool in tools]
            return make_tools(functions, mode, names, body.parallel_tool_calls, limits)
        case choice:
            return make_tools(functions, choice, None, body.parallel_tool_calls, limits)
