"""Bodies of `/v1/responses`: OpenAI's fields, and ours beside them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from layerskip.serving.protocol.requests import Body, GenerationBody, TextPart, Tokens

MOST_NAME = 64
"""Characters of a function's name."""


class Item(BaseModel):
    """A part of a conversation; clients send back what answers held, so that fields beyond those named are let be."""

    model_config = ConfigDict(extra="allow", strict=True)


class MessageItem(Item):
    """What one side has said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart]


class CallItem(Item):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class CallOutputItem(Item):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


class ReasoningItem(Item):
    """What a model has thought; not shown to this one."""

    type: Literal["reasoning"]


class OtherItem(Item):
    """Something that isn't supported."""

    type: Any = None


def _item_kind(value: Any) -> str:
    if isinstance(value, Item):  # as it is written out
        return type(value).__name__
    if not isinstance(value, dict):
        return "OtherItem"
    kinds = {
        "message": "MessageItem",
        "function_call": "CallItem",
        "function_call_output": "CallOutputItem",
        "reasoning": "ReasoningItem",
    }
    kind = value.get("type", "message" if "role" in value else None)
    return kinds.get(kind, "OtherItem") if isinstance(kind, str) else "OtherItem"


InputItem = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[CallOutputItem, Tag("CallOutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[OtherItem, Tag("OtherItem")],
    Discriminator(_item_kind),
]


class FunctionTool(Item):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=MOST_NAME, pattern=r"^[a-zA-Z0-9_.\-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Item):
    """A tool that isn't known here; it is ignored."""

    type: str


def _tool_kind(value: Any) -> str:
    if isinstance(value, Item):
        return type(value).__name__
    return "FunctionTool" if isinstance(value, dict) and value.get("type") == "function" else "OtherTool"


Tool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")] | Annotated[OtherTool, Tag("OtherTool")], Discriminator(_tool_kind)
]


class NamedFunctionTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class AllowedFunctionTools(Body):
    """The functions that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1)]


class TextFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponsesBody(GenerationBody):
    """Body of `/v1/responses`."""

    input: str | list[InputItem]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | AllowedFunctionTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    max_output_tokens: Tokens | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    # Nothing is kept between requests:
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    # OpenAI's, without a meaning here:
    access_programs: Any = None
    background_options: Any = None
    client_metadata: Any = None
    context_management: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    truncation: Any = None
