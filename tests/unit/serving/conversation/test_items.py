"""Input of `/v1/responses` as messages; what tools may be called."""

from typing import Any

import pytest

from layerskip.serving.config import RequestLimits
from layerskip.serving.conversation.deltas import Arguments, CallStart, Content
from layerskip.serving.conversation.items import input_messages, response_tools
from layerskip.serving.conversation.tools import Function, make_tools
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.responses import ResponsesBody
from layerskip.serving.routes.response_events import ResponseWriter


def messages(items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return input_messages(ResponsesBody.model_validate({"input": items}).input, instructions)


def call(call_id: str, name: str = "get", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def made(call_id: str, name: str = "get", **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_text_and_instructions() -> None:
    user = {"role": "user", "content": "Hi"}
    assert messages("Hi") == [user]
    assert messages("Hi", "Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    several = [{"role": "developer", "content": "No jokes."}, {"role": "user", "content": "Hi"}]
    assert messages(several, "Be brief.") == [{"role": "system", "content": "Be brief.\n\nNo jokes."}, user]


def test_calls_belong_to_the_message_before_them() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        call("1", arguments='{"x": 1}'),
        call("2", "put"),
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "e"}]},
        call("3"),
        {"type": "function_call_output", "call_id": "3", "output": ""},
    ]
    assert messages(items) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c", "tool_calls": [made("1", x=1), made("2", "put")]},
        {"role": "tool", "tool_call_id": "1", "name": "get", "content": "d"},
        {"role": "tool", "tool_call_id": "2", "name": "put", "content": "e"},
        {"role": "assistant", "content": "", "tool_calls": [made("3")]},
        {"role": "tool", "tool_call_id": "3", "name": "get", "content": ""},
    ]


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        ([{"role": "system", "content": "x"}], "input"),
        ([{"type": "computer_call"}], "input[0]"),
        ([{"role": "user", "content": "x"}, call("1", arguments="nil")], "input[1].arguments"),
    ],
)
def test_what_is_wrong_is_named(items: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages(items)
    assert (caught.value.status, caught.value.param) == (400, param)


def tools(**fields: Any) -> Any:
    return response_tools(ResponsesBody.model_validate({"input": "x", **fields}), RequestLimits())


def test_other_tools_are_ignored() -> None:
    get = {"type": "function", "name": "get", "parameters": {"type": "object"}}
    use = tools(tools=[{"type": "web_search"}, get, {"type": "new", "x": [1]}])
    assert [function.name for function in use.functions] == ["get"]
    assert (use.is_required, use.is_parallel) == (False, True)
    assert use.functions[0].param == "tools[1].parameters"
    assert tools(tools=[{"type": "web_search"}]) is None
    assert tools(tools=[get], tool_choice="none") is None
    named = tools(tools=[get, {**get, "name": "put"}], tool_choice={"type": "function", "name": "put"})
    assert ([function.name for function in named.allowed], named.is_required) == (["put"], True)


@pytest.mark.parametrize("names", [["put"], ["get", "put"]])
def test_a_choice_that_isnt_among_the_tools(names: list[str]) -> None:
    with pytest.raises(ApiError, match="'put'"):
        make_tools([Function(name="get", param="tools")], "auto", names, None, RequestLimits())


def test_limits() -> None:
    limits = RequestLimits(tools=2, schema_bytes=40)
    small = [Function(name=name, param=f"tools[{name}]") for name in "ab"]
    assert make_tools(small, None, None, None, limits) is not None
    with pytest.raises(ApiError, match="2 tools, got 3"):
        make_tools([*small, Function(name="c", param="")], None, None, None, limits)
    large = Function(name="c", parameters={"type": "object", "title": "x" * 40}, param="tools[1]")
    with pytest.raises(ApiError, match="40 bytes") as caught:
        make_tools([small[0], large], None, None, None, limits)
    assert caught.value.param == "tools[1]"


def test_items_of_an_answer() -> None:
    writer = ResponseWriter()
    start = CallStart(index=0, id="call_1", name="get")
    events = writer.add([Content(text="a")], [{"token": "a"}])
    events += writer.add([], [{"token": "x"}])
    events += writer.add([Content(text="b"), start, Arguments(index=0, text="{")], [{"token": "b"}])
    events += writer.add([Arguments(index=0, text="}"), Content(text="c")])
    events += writer.finish("incomplete")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    shapes = [{key: value for key, value in item.items() if key != "id"} for item in writer.output]
    first, second, third = shapes
    assert first["content"] == [
        {"type": "output_text", "text": "ab", "annotations": [], "logprobs": [{"token": t} for t in "axb"]}
    ]
    assert second == {
        "type": "function_call",
        "status": "completed",
        "call_id": "call_1",
        "name": "get",
        "arguments": "{}",
    }
    assert third["content"][0]["text"] == "c"
    assert [item["status"] for item in shapes] == ["completed", "completed", "incomplete"]
    assert writer.finish("completed") == []


def test_an_empty_answer_is_an_empty_message() -> None:
    writer = ResponseWriter()
    kinds = [event["type"] for event in writer.finish("completed")]
    assert kinds == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert writer.output[0]["content"][0]["text"] == ""
