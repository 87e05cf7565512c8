"""Bodies of requests: OpenAI's fields, and ours beside them. Types are checked here, meanings where they are used.

Fields that OpenAI has and that change nothing here are accepted; a field that nobody has is an error.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from layerskip.decoding.config import Strategy

MOST_TOKENS = 1_000_000
MOST_MESSAGES = 2048
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class Body(BaseModel):
    """A JSON object whose fields have exactly the types that are declared."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""
    include_obfuscation: bool | None = None
    """Accepted and ignored."""
    include_drafts: bool | None = None
    """One chunk for each round, which says what was drafted and accepted in it (not OpenAI's)."""


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    """Name of the model; that of this server if not given."""
    stream: bool | None = None
    """Answer in server-sent events, a chunk for each round."""
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """Divides the logits; 0 is greedy. 1 if not given."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Sample among the most likely tokens that together have this probability."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Texts for each prompt."""
    seed: Seed | None = None
    """Seed of sampling; text i of n has seed + i."""
    stop: str | list[str] | None = None
    """Texts that end the answer, and are not part of it."""
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    """Taken from a token's logit for each time that it was generated."""
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    """Taken from a token's logit if it was generated at all."""
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    """Added to the logits of tokens, by their ids."""
    user: str | None = None
    # Not OpenAI's:
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    """Sample among the k most likely tokens."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Sample among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    """Above 1, tokens of prompt and answer become less likely."""
    generation_strategy: Strategy | None = None
    """Who drafts; adaptive if not given."""
    exit_layer: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Layers that draft; adaptive decoding chooses if not given."""
    num_speculations: Annotated[int, Field(ge=1, le=128)] | None = None
    """Most tokens to draft in a round."""
    ignore_eos: bool | None = None
    """Write on after an end-of-sequence token."""


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    """Texts or lists of token ids, one or several."""
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    """Tokens to generate at most, 16 if not given; 0 only with echo."""
    echo: bool | None = None
    """Give the prompt too, with its log-probabilities if they are asked for."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


class FunctionCall(Body):
    """A call that the assistant has made."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Body):
    """A tool call in the assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class MessageBody(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: FunctionCall | None = None


class FunctionBody(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.\-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool."""

    type: Literal["function"]
    function: FunctionBody


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedTools(Body):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


class JsonSchemaBody(Body):
    """A schema with its name."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # OpenAI's, without a meaning here:
    audio: None = None
    metadata: Any = None
    modalities: list[Literal["text"]] | None = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: bool | None = None
    verbosity: Any = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


class TokenizeBody(Body):
    """Body of `/tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
