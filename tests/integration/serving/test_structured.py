"""Answers that are held to JSON, with speculation on: every one of them parses and fits its schema."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest
from answer_schemas import SCHEMAS
from chat_templates import PLAIN
from openai import OpenAI

pytest.importorskip("llguidance")
QUESTION = [{"role": "user", "content": "Tell me about the weather in Paris, as JSON."}]
SPECULATES = {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 4}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def ask(client: OpenAI, schema: dict[str, Any], n: int, **options: Any) -> Any:
    model = client.models.list().data[0].id
    settings = {"max_tokens": 400, "temperature": 1.0, "seed": 7, **options}
    return client.chat.completions.create(model=model, messages=QUESTION, response_format=form(schema), n=n, **settings)  # type: ignore[call-overload]


def check(answer: Any, schema: dict[str, Any]) -> None:
    for choice in answer.choices:
        assert choice.finish_reason == "stop", choice.message.content
        jsonschema.validate(json.loads(choice.message.content), schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_ten_answers_of_a_model_that_knows_nothing(chats: Callable[..., OpenAI], name: str) -> None:
    answer = ask(chats(PLAIN), SCHEMAS[name], 10, extra_body=SPECULATES)
    check(answer, SCHEMAS[name])
    assert answer.metrics["speculative_decoding"]["num_draft_tokens"] > 0
    assert len({choice.message.content for choice in answer.choices}) > 1 or name in ("enums", "tree", "choice")


@pytest.mark.parametrize("name", SCHEMAS)
def test_speculation_changes_nothing(chats: Callable[..., OpenAI], name: str) -> None:
    client = chats(PLAIN)
    plain, drafted, adaptive = (
        ask(client, SCHEMAS[name], 2, extra_body=options)
        for options in ({"generation_strategy": "autoregressive"}, SPECULATES, {})
    )
    texts = [choice.message.content for choice in plain.choices]
    assert [choice.message.content for choice in drafted.choices] == texts
    assert [choice.message.content for choice in adaptive.choices] == texts


def test_a_stream_gives_the_same_text(chats: Callable[..., OpenAI]) -> None:
    client = chats(PLAIN)
    whole = ask(client, SCHEMAS["quotes"], 2)
    texts = ["", ""]
    for chunk in ask(client, SCHEMAS["quotes"], 2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_ten_answers_of_a_trained_model(smollm2: OpenAI, name: str) -> None:
    check(ask(smollm2, SCHEMAS[name], 10, temperature=0.8), SCHEMAS[name])


def test_any_object(smollm2: OpenAI) -> None:
    question = [{"role": "user", "content": 'Repeat this: {"city": "Paris", "sunny": true}'}]
    answer = smollm2.chat.completions.create(
        model="smollm2", messages=question, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )  # type: ignore[call-overload]
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"type": "json_schema"}, "response_format", "json_schema.schema"),
        (form({"type": "strange"}), "response_format", "can't be compiled"),
        (form({"$ref": "https://example.com/schema"}), "response_format", "nothing is fetched"),
        (form({"enum": ["x" * 70_000]}), "response_format", "65536 bytes"),
        (form({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}), "response_format", "not"),
        (form({"$ref": "#"}), "response_format", "no text has this form"),
        ({"type": "yaml"}, "response_format.type", "json_schema"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    chats: Callable[..., OpenAI], given: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chats(PLAIN).chat.completions.create(model="", messages=QUESTION, response_format=given)  # type: ignore[call-overload]
    assert caught.value.param == param
    assert text in str(caught.value)


def test_a_deep_schema_is_refused_and_others_are_answered(chats: Callable[..., OpenAI]) -> None:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError):
        ask(chats(PLAIN), schema, 1)
    check(ask(chats(PLAIN), SCHEMAS["flat"], 1), SCHEMAS["flat"])
