"""Messages of chats as templates want them."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from layerskip.serving.conversation.messages import template_variables, to_messages
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.requests import MessageBody


def messages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return to_messages(TypeAdapter(list[MessageBody]).validate_python(given))


def test_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"role": "developer", "content": parts}) == [{"role": "system", "content": "ab"}]
    assert messages({"role": "assistant", "refusal": "No."}) == [{"role": "assistant", "content": "No."}]


def test_calls_and_results() -> None:
    function = {"name": "get", "arguments": '{"city": "Rome"}'}
    call = {"id": "1", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "1", "content": "hot"}
    assert messages({"role": "assistant", "content": None, "tool_calls": [call]}, result) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "get", "arguments": {"city": "Rome"}}}],
        },
        result,
    ]


@pytest.mark.parametrize("arguments", ["{", "[]", "3", '"x"', "[" * 100_000])
def test_arguments_must_be_an_object(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": arguments}}
    with pytest.raises(ApiError, match="JSON object") as caught:
        messages({"role": "assistant", "tool_calls": [call]})
    assert caught.value.param == "messages[0].tool_calls"


def test_a_message_without_content() -> None:
    with pytest.raises(ApiError) as caught:
        messages({"role": "user", "content": "x"}, {"role": "user"})
    assert caught.value.param == "messages[1].content"


def test_variables_of_templates() -> None:
    good = {"enable_thinking": False, "thinking": True, "reasoning_effort": "low"}
    assert template_variables(good) == good
    assert template_variables(None) == {}
    for bad in ({"messages": []}, {"enable_thinking": "no"}, {"reasoning_effort": {}}, {"chat_template": "x"}):
        with pytest.raises(ApiError) as caught:
            template_variables(bad)
        assert caught.value.param == "chat_template_kwargs"
