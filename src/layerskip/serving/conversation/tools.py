"""The functions that a request lets the model call, whatever API the request came by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.serving.config import RequestLimits
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.requests import AllowedTools, NamedTool, ToolBody

NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}}
"""Schema of the arguments of a function that takes none."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """JSON schema of its arguments; None: it takes none."""
    param: str
    """Where the schema stands in the request."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of its arguments."""
        return NOTHING if self.parameters is None else self.parameters

    @property
    def described(self) -> dict[str, Any]:
        """The function as chat templates want it."""
        described: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            described["description"] = self.description
        return {"type": "function", "function": {**described, "parameters": dict(self.schema)}}


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What the model is told of functions, and which it may call."""

    functions: tuple[Function, ...]
    """Those that the prompt describes."""
    allowed: tuple[Function, ...]
    """Those that may be called."""
    is_required: bool
    """Whether the answer must be a call."""
    is_parallel: bool
    """Whether an answer may hold several calls."""


def chat_tools(
    tools: Sequence[ToolBody] | None,
    choice: str | NamedTool | AllowedTools | None,
    is_parallel: bool | None,
    limits: RequestLimits,
) -> ToolUse | None:
    """The functions of a chat; None if none may be called.

    Raises:
        ApiError: Too many or too large, two of one name, or a choice that isn't among them.
    """
    functions = [
        Function(
            name=tool.function.name,
            description=tool.function.description,
            parameters=tool.function.parameters,
            param=f"tools[{place}].function.parameters",
        )
        for place, tool in enumerate(tools or ())
    ]
    match choice:
        case NamedTool():
            return make_tools(functions, "required", [choice.function.name], is_parallel, limits)
        case AllowedTools(allowed_tools=allowed):
            names = [tool.function.name for tool in allowed.tools]
            return make_tools(functions, allowed.mode, names, is_parallel, limits)
        case _:
            return make_tools(functions, choice, None, is_parallel, limits)


def make_tools(
    functions: Sequence[Function],
    choice: str | None,
    names: Sequence[str] | None,
    is_parallel: bool | None,
    limits: RequestLimits,
) -> ToolUse | None:
    """What the model may call; None if it may call nothing.

    Args:
        functions: What the request describes.
        choice: none, auto (also if not given) or required.
        names: Functions that may be called; all if not given.
        is_parallel: Whether an answer may hold several calls; it may if not given.
        limits: What a request may ask for at most.

    Raises:
        ApiError: Too many or too large, two of one name, or a choice that isn't among them.
    """
    _check(functions, limits)
    known = {function.name: function for function in functions}
    for name in names or ():
        if name not in known:
            raise _wrong("tool_choice", f"tool_choice names {name[:80]!r}, which is not among the tools")
    if choice == "required" and not (functions if names is None else names):
        raise _wrong("tool_choice", "tool_choice asks for a call, and there are no tools to call; give tools")
    if choice == "none" or not functions:
        return None
    return ToolUse(
        functions=tuple(functions),
        allowed=tuple(functions if names is None else [known[name] for name in dict.fromkeys(names)]),
        is_required=choice == "required",
        is_parallel=is_parallel is not False,
    )


def _check(functions: Sequence[Function], limits: RequestLimits) -> None:
    if len(functions) > limits.tools:
        raise _wrong("tools", f"a request may have {limits.tools} tools, got {len(functions)}")
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            raise _wrong("tools", f"two tools are called {function.name!r}; each needs a name of its own")
        seen.add(function.name)
        size = schema_bytes(function.schema)
        if size > limits.schema_bytes:
            raise _wrong(function.param, f"a schema may have {limits.schema_bytes} bytes, got {size}")
        if function.schema.get("type", "object") != "object":
            raise _wrong(function.param, "parameters must be the schema of an object: its properties are the arguments")


def schema_bytes(schema: Mapping[str, Any]) -> int:
    """Bytes of a JSON schema."""
    return len(json.dumps(schema, separators=(",", ":")))


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
