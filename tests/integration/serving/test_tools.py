"""Calls of functions, by the official client."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest
from chat_templates import HERMES, LLAMA, MISTRAL, PLAIN
from openai import OpenAI

pytest.importorskip("llguidance")
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET", '日本 "é"']}}, "required": ["zone"]}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME, "stop": {"type": "object", "properties": {}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "description": "Time.", "parameters": TIME}},
    {"type": "function", "function": {"name": "stop"}},
]
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris? Use C."}]
STYLES: list[tuple[str, tuple[str, ...]]] = [
    (PLAIN, ()),
    (HERMES, ()),
    (HERMES, ("<tool_call>", "</tool_call>")),
    (MISTRAL, ("[TOOL_CALLS]",)),
    (LLAMA, ("<|python_tag|>",)),
]
SPECULATES = {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 4}
Chats = Callable[..., OpenAI]


def ask(client: OpenAI, **options: Any) -> Any:
    model = client.models.list().data[0].id
    settings = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 300, "temperature": 1.0, "seed": 3, **options}
    return client.chat.completions.create(model=model, **settings)


def check(choice: Any, names: list[str]) -> None:
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        assert call.id.startswith("call_")
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize(("template", "special"), STYLES)
def test_required_calls_fit_their_schemas(chats: Chats, template: str, special: tuple[str, ...]) -> None:
    answer = ask(
        chats(template, special), tool_choice="required", parallel_tool_calls=False, n=6, extra_body=SPECULATES
    )
    for choice in answer.choices:
        check(choice, list(SCHEMAS))
        assert len(choice.message.tool_calls) == 1
    assert answer.metrics["speculative_decoding"]["num_draft_tokens"] > 0


@pytest.mark.parametrize(("template", "special"), STYLES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function(chats: Chats, template: str, special: tuple[str, ...], name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    answer = ask(chats(template, special), tool_choice=choice, parallel_tool_calls=False)
    check(answer.choices[0], [name])


def test_allowed_tools(chats: Chats) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = ask(chats(HERMES), tool_choice=choice, parallel_tool_calls=False, n=4)
    for each in answer.choices:
        check(each, ["get_time"])


def together(stream: Any, number: int) -> list[dict[str, Any]]:
    """Whole answers from the chunks of a stream, as a client puts them together."""
    made: list[dict[str, Any]] = [{"content": "", "calls": [], "reason": None} for _ in range(number)]
    for chunk in stream:
        for choice in chunk.choices:
            answer = made[choice.index]
            assert answer["reason"] is None
            answer["content"] += choice.delta.content or ""
            answer["reason"] = choice.finish_reason
            for part in choice.delta.tool_calls or ():
                if part.id is not None:
                    assert part.index == len(answer["calls"])
                    assert part.type == "function"
                    answer["calls"].append([part.function.name, ""])
                answer["calls"][part.index][1] += part.function.arguments or ""
    return made


@pytest.mark.parametrize(("template", "special"), STYLES)
@pytest.mark.parametrize("options", [{"tool_choice": "required"}, {"max_tokens": 60}, {"stop": ["get", "}"]}])
def test_a_stream_is_the_whole_answer(
    chats: Chats, template: str, special: tuple[str, ...], options: dict[str, Any]
) -> None:
    client, number = chats(template, special), 3
    settings = {"n": number, "extra_body": SPECULATES, "max_tokens": 120, **options}
    whole = ask(client, **settings)
    streamed = together(ask(client, stream=True, **settings), number)
    for choice, answer in zip(whole.choices, streamed, strict=True):
        calls = choice.message.tool_calls or []
        assert answer["calls"] == [[call.function.name, call.function.arguments] for call in calls]
        assert answer["content"] == (choice.message.content or "")
        assert answer["reason"] == choice.finish_reason


def test_speculation_changes_nothing(chats: Chats) -> None:
    for template, special in STYLES:
        client = chats(template, special)
        plain, drafted = (
            ask(client, tool_choice="required", n=3, max_tokens=150, extra_body=options).choices
            for options in ({"generation_strategy": "autoregressive"}, SPECULATES)
        )
        for one, other in zip(plain, drafted, strict=True):
            calls = [[(c.function.name, c.function.arguments) for c in x.message.tool_calls] for x in (one, other)]
            assert calls[0] == calls[1]
            assert one.finish_reason == other.finish_reason


def test_a_call_that_is_cut_off_is_given_as_far_as_it_goes(chats: Chats) -> None:
    answer = ask(chats(HERMES), tool_choice={"type": "function", "function": {"name": "get_weather"}}, max_tokens=58)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert call.function.arguments.startswith("{")


def test_none_means_text(smollm2: OpenAI) -> None:
    answer = ask(smollm2, tool_choice="none", max_tokens=10, temperature=0)
    plain = ask(smollm2, tools=openai.NOT_GIVEN, max_tokens=10, temperature=0)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == plain.choices[0].message.content


def test_a_whole_conversation(smollm2: OpenAI) -> None:
    first = ask(smollm2, tool_choice="required", parallel_tool_calls=False, temperature=0)
    (call,) = first.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] == "Paris"
    messages = [
        *QUESTION,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "22 C, sunny"},
    ]
    second = ask(smollm2, messages=messages, temperature=0, max_tokens=80)
    assert second.choices[0].message.content or second.choices[0].message.tool_calls
    text = ask(smollm2, messages=messages, tools=openai.NOT_GIVEN, temperature=0, max_tokens=40)
    assert text.choices[0].message.content


def test_a_model_may_choose(smollm2: OpenAI) -> None:
    """Its answers are calls that fit or text without a mark of a call."""
    reasons = set()
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 64}
        (choice,) = ask(smollm2, parallel_tool_calls=False, **options).choices
        reasons.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            (call,) = choice.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        else:
            assert "<tool_call>" not in (choice.message.content or "")
    assert reasons <= {"tool_calls", "stop", "length"}


def test_calls_or_json(chats: Chats) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": TIME}}
    for choice in ask(chats(HERMES), response_format=form, n=8, parallel_tool_calls=False).choices:
        if choice.message.tool_calls:
            check(choice, list(SCHEMAS))
        else:
            assert json.loads(choice.message.content)["zone"] in TIME["properties"]["zone"]["enum"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="can't be told from it"):
        ask(chats(LLAMA, ("<|python_tag|>",)), response_format=form)


@pytest.mark.parametrize(
    ("options", "param", "text"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "two tools"),
        ({"tools": TOOLS * 50}, "tools", "128"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "not among the tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "give tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "auto"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "magic"}]}, "tools[0].type", "function"),
        (
            {"tools": [TOOLS[0], {"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]},
            "tools[1].function.parameters",
            "object",
        ),
        (
            {
                "tools": [
                    TOOLS[0],
                    {
                        "type": "function",
                        "function": {
                            "name": "x",
                            "parameters": {"type": "object", "properties": {"a": {"$ref": "http://localhost/x"}}},
                        },
                    },
                ]
            },
            "tools[1].function.parameters",
            "nothing is fetched",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"enum": ["x" * 70_000]}}}]},
            "tools[0].function.parameters",
            "65536 bytes",
        ),
        (
            {
                "messages": [
                    *QUESTION,
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "c", "type": "function", "function": {"name": "stop", "arguments": "[1]"}}
                        ],
                    },
                ]
            },
            "messages[1].tool_calls",
            "JSON object",
        ),
    ],
)
def test_what_is_wrong_is_named(chats: Chats, options: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(chats(PLAIN), **options)
    assert caught.value.param == param
    assert text in str(caught.value)
