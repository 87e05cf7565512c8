"""`/v1/responses` by the official client."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from chat_templates import HERMES, LLAMA, MISTRAL, PLAIN
from openai import OpenAI
from pydantic import BaseModel

pytest.importorskip("llguidance")
Chats = Callable[..., OpenAI]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": CITY, "strict": True},
    {"type": "web_search"},
    {"type": "namespace", "name": "mcp", "tools": [1, {"a": None}]},
    {"type": "function", "name": "stop"},
]
QUESTION = "What is the weather in Paris? Use C."
SETTINGS: dict[str, Any] = {"temperature": 1.0, "max_output_tokens": 60, "extra_body": {"seed": 5}}
STYLES: list[tuple[str, tuple[str, ...]]] = [(PLAIN, ()), (HERMES, ()), (MISTRAL, ("[TOOL_CALLS]",)), (LLAMA, ())]


def ask(client: OpenAI, **options: Any) -> Any:
    model = client.models.list().data[0].id
    return client.responses.create(**{"model": model, "input": QUESTION, **SETTINGS, **options})


def output(response: Any) -> list[dict[str, Any]]:
    """Items without their names, which are new each time."""
    items = [item.model_dump(exclude_none=True) for item in response.output]
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_text(smollm2: OpenAI) -> None:
    response = ask(smollm2, instructions="Be brief.", temperature=0, metadata={"a": "b"}, store=True)
    chat = smollm2.chat.completions.create(
        model="smollm2",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=60,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert (response.store, response.previous_response_id, response.error) == (False, None, None)
    assert (response.metadata, response.temperature, response.max_output_tokens) == ({"a": "b"}, 0, 60)
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.metrics["speculative_decoding"]["num_drafts"] >= 0


def test_a_limit_makes_an_answer_incomplete(chats: Chats) -> None:
    response = ask(chats(PLAIN), max_output_tokens=2, extra_body={"ignore_eos": True})
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 2


ORDER = {
    "response.created": {"response.in_progress"},
    "response.in_progress": {"response.output_item.added"},
    "response.output_item.added": {
        "response.content_part.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    },
    "response.content_part.added": {"response.output_text.delta", "response.output_text.done"},
    "response.output_text.delta": {"response.output_text.delta", "response.output_text.done"},
    "response.output_text.done": {"response.content_part.done"},
    "response.content_part.done": {"response.output_item.done"},
    "response.function_call_arguments.delta": {
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    },
    "response.function_call_arguments.done": {"response.output_item.done"},
    "response.output_item.done": {"response.output_item.added", "response.completed", "response.incomplete"},
}
"""What may follow an event."""


@pytest.mark.parametrize(("template", "special"), STYLES)
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "get_weather"}])
def test_a_stream_is_the_whole_answer(chats: Chats, template: str, special: tuple[str, ...], choice: Any) -> None:
    client = chats(template, special)
    options = {"tools": TOOLS, "tool_choice": choice, "max_output_tokens": 90}
    whole = ask(client, **options)
    events = list(ask(client, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert all(after in ORDER[before] for before, after in itertools.pairwise(kinds))
    assert kinds[-1] == f"response.{whole.status}"
    assert output(events[-1].response) == output(whole)
    assert events[-1].response.usage.input_tokens == whole.usage.input_tokens
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    made: dict[int, str] = {}
    for event in events:
        if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
            made[event.output_index] = made.get(event.output_index, "") + event.delta
            assert event.item_id == events[-1].response.output[event.output_index].id
    for place, item in enumerate(whole.output):
        assert made.get(place, "") == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_the_clients_own_stream(chats: Chats) -> None:
    client = chats(HERMES)
    model = client.models.list().data[0].id
    choice: Any = {"type": "function", "name": "get_weather"}
    with client.responses.stream(
        model=model,
        input=QUESTION,
        tools=TOOLS[:1],  # type: ignore[arg-type]
        tool_choice=choice,
        parallel_tool_calls=False,
        extra_body={"seed": 1},
    ) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), CITY)


class Weather(BaseModel):
    city: str
    degrees: int


def test_a_form(smollm2: OpenAI) -> None:
    response = smollm2.responses.parse(
        model="smollm2", input=QUESTION, text_format=Weather, temperature=0, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Weather)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


def test_a_conversation_of_items(smollm2: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0, "tools": TOOLS}
    first = ask(smollm2, tool_choice="required", parallel_tool_calls=False, **options)
    (call,) = first.output
    assert json.loads(call.arguments)["city"] == "Paris"
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "22 C, sunny"},
    ]
    second = ask(smollm2, input=items, tool_choice="none", **options)
    assert second.output_text
    third = ask(
        smollm2,
        input=[
            *items,
            *(item.model_dump(exclude_none=True) for item in second.output),
            {"role": "user", "content": "Why?"},
        ],
        instructions="Answer.",
        tool_choice="none",
        **options,
    )
    assert third.output_text
    assert third.usage.input_tokens > second.usage.input_tokens


def test_logprobs(smollm2: OpenAI) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 12}
    response = ask(smollm2, temperature=0, **options)
    found = response.output[0].content[0].logprobs
    assert len(found) == response.usage.output_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in found)
    events = list(ask(smollm2, temperature=0, stream=True, **options))
    streamed = [
        entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs
    ]
    assert streamed == [entry.token for entry in found]


def test_a_client_that_sends_much(chats: Chats) -> None:
    """Fields as Codex and others send them."""
    response = ask(
        chats(HERMES),
        tools=TOOLS,
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        store=False,
        truncation="auto",
        user="someone",
        service_tier="auto",
        prompt_cache_key="key",
        text={"verbosity": "low", "format": {"type": "text"}},
        extra_body={"client_metadata": {"a": "b"}, "top_k": 5, "min_p": 0.1, "exit_layer": 2, "num_speculations": 3},
    )
    assert response.status in ("completed", "incomplete")
    assert [tool.name for tool in response.tools] == ["get_weather", "stop"]
    assert (response.user, response.prompt_cache_key, response.truncation) == ("someone", "key", "disabled")


@pytest.mark.parametrize(
    ("options", "param", "text"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps nothing"),
        ({"conversation": "conv_1"}, "conversation", "keeps nothing"),
        ({"background": True}, "background", "keeps nothing"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps nothing"),
        ({"input": []}, "input", "at least one"),
        ({"input": [{"type": "custom_tool_call"}]}, "input[0]", "custom_tool_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "item_reference"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "user"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://localhost/x"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "JSON object",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two tools"),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "list"}}]},
            "tools[0].parameters",
            "object",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "strange"}}}}]},
            "tools[0].parameters",
            "strange",
        ),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tool_choice": "required"}, "tool_choice", "give tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "needs a schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "http://localhost/x"}}}},
            "text.format.schema",
            "nothing is fetched",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"extra_body": {"surprise": 1}}, "surprise", "not known"),
        ({"extra_body": {"n": 2}}, "n", "less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named(chats: Chats, options: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(chats(PLAIN), **options)
    assert caught.value.param == param
    assert text in str(caught.value)


def test_events_carry_their_names(chats: Chats) -> None:
    client = chats(PLAIN)
    body = {"input": "Hi", "stream": True, "max_output_tokens": 5}
    lines = httpx.post(f"{client.base_url}responses", json=body, timeout=60).text.split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    kinds = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert names == kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")
