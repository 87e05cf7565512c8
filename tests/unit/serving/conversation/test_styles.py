"""What templates say of tools, and how conversations with calls are put to them."""

import json
import re
from typing import Any

import pytest
from chat_templates import HERMES, LLAMA, MISTRAL, PLAIN, TAGS, text_tokenizer_with, tokenizer_with
from tokenizers import AddedToken

from layerskip.serving.conversation.prompts import instruction, templated
from layerskip.serving.conversation.styles import ToolStyle
from layerskip.serving.conversation.tools import Function, ToolUse
from layerskip.text.chat_template import render
from layerskip.text.tokenizer import Tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = Function(name="get", description="Gets it.", parameters=CITY, param="tools[0].function.parameters")
LIST = Function(name="list", param="tools[1].function.parameters")
TOOLS = ToolUse(functions=(GET, LIST), allowed=(GET, LIST), is_required=False, is_parallel=True)


def call(call_id: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Rome and Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("call_1", "get", city="Rome"), call("call_2", "get", city="Oslo")],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "hot"},
    {"role": "tool", "tool_call_id": "call_2", "content": "cold"},
]


def written(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: ToolUse | None = TOOLS) -> str:
    given, described = templated(messages, ToolStyle.of(tokenizer), tools)
    return render(tokenizer, given, tools=described)


@pytest.mark.parametrize(
    ("template", "special", "form", "is_native", "has_system", "gap"),
    [
        (PLAIN, [], "hermes", False, True, "\n"),
        (HERMES, [], "hermes", True, True, "\n"),
        (HERMES, ["<tool_call>", "</tool_call>"], "hermes", True, True, "\n"),
        (MISTRAL, ["[TOOL_CALLS]"], "mistral", True, False, " "),
        (LLAMA, ["<|python_tag|>"], "llama", True, True, ""),
        (TAGS, [], "hermes", False, True, "\n"),
    ],
)
def test_the_template_says_how_calls_are_written(
    template: str, special: list[str], form: str, is_native: bool, has_system: bool, gap: str
) -> None:
    for tokenizer in (tokenizer_with(template, special), text_tokenizer_with(template, special)):
        style = ToolStyle.of(tokenizer)
        assert (style.form.name, style.is_native, style.has_system) == (form, is_native, has_system)
        assert style.form.gap == gap
        assert style.marks == {mark: tokenizer.convert_tokens_to_ids([mark])[0] for mark in special}
        assert style.shown == {token: mark for mark, token in style.marks.items()}
        assert style.spoken == ()


def test_without_a_template_of_its_own_the_system_message_describes_tools() -> None:
    tokenizer = tokenizer_with(PLAIN)
    text = written(tokenizer, [{"role": "system", "content": "Be brief."}, *TALK])
    system, user, assistant, results, opening = text.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n")
    listed = re.search(r"<tools>\n(.*)\n</tools>", system, re.DOTALL)
    assert listed is not None
    assert [json.loads(line) for line in listed[1].splitlines()] == [GET.described, LIST.described]
    assert user == "<|im_start|>user\nWeather in Rome and Oslo?"
    assert assistant == (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call>'
    )
    assert results == (
        "<|im_start|>user\n<tool_response>\nhot\n</tool_response>\n<tool_response>\ncold\n</tool_response>"
    )
    assert opening == "<|im_start|>assistant\n"


def test_earlier_calls_are_written_without_tools_too() -> None:
    text = written(tokenizer_with(PLAIN), TALK, tools=None)
    assert "<tools>" not in text
    assert text.count("<tool_call>") == text.count("<tool_response>") == 2


def test_without_system_messages_the_user_describes_tools() -> None:
    template = PLAIN.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{% if message.role == 'system' %}{{ raise_exception('none') }}{% endif %}",
    )
    text = written(tokenizer_with(template), TALK)
    assert text.startswith(f"<|im_start|>user\n{instruction(TOOLS.functions)}\n\nWeather in Rome")


def test_qwens_way() -> None:
    text = written(tokenizer_with(HERMES), TALK)
    assert "You may call" not in text
    assert json.dumps(GET.described) in text
    assert text.count("<tool_call>\n") == 2


def test_mistrals_ids_have_nine_letters() -> None:
    text = written(tokenizer_with(MISTRAL), TALK)
    assert text.count("[TOOL_CALLS] [") == 1
    ids = re.findall(r'"id": "(\w+)"', text)
    assert len(set(ids)) == 2
    assert all(len(each) == 9 for each in ids)


def test_llamas_calls_come_one_by_one() -> None:
    text = written(tokenizer_with(LLAMA), TALK)
    places = [text.index(part) for part in ('{"city": "Rome"}', "hot", '{"city": "Oslo"}', "cold")]
    assert places == sorted(places)


def test_a_way_that_isnt_known_is_not_used() -> None:
    text = written(tokenizer_with(TAGS), TALK)
    assert "<function=" not in text
    assert text.count("<tool_call>\n{") == 3  # one of them in the instruction


def test_marks_that_are_ordinary_added_tokens() -> None:
    tokenizer = tokenizer_with(HERMES)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>", "<think>")])
    opening, closing, think = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>", "<think>"])
    style = ToolStyle.of(tokenizer)
    assert (style.marks, style.shown) == ({"<tool_call>": opening, "</tool_call>": closing}, {})
    assert style.spoken == (think,)
