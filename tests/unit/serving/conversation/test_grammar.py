"""Grammars of calls: what begins like a call must go on as one, and arguments fit their schemas."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from chat_templates import PLAIN, tokenizer_with
from tiny_tokenizers import without_transformers
from tokenizers import AddedToken

from layerskip.serving.conversation.formats import FORMATS, HERMES, LLAMA, MISTRAL, CallFormat
from layerskip.serving.conversation.grammar import call_grammar, closed
from layerskip.serving.conversation.tools import Function, ToolUse
from layerskip.text.tokenizer import TextTokenizer

pytest.importorskip("llguidance")
from layerskip.structured.compiler import GrammarCompiler

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
GET, GET_ALL = (Function(name=name, parameters=CITY, param="tools") for name in ("get", "get_all"))
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
MARKS = ["[TOOL_CALLS]", "<tool_call>", "</tool_call>"]
PLAIN_TEXT, ADDED, SPECIAL = "plain text", "added", "special"
"""What the marks of calls are to a tokenizer: nothing, tokens of their own, or special tokens, which give no text."""
ONE, OTHER = ("get", {"city": "Rome"}), ("get_all", {"city": "Oslo"})


@cache
def compiler(marks: str) -> tuple[TextTokenizer, GrammarCompiler]:
    tokenizer = tokenizer_with(PLAIN, MARKS if marks == SPECIAL else [])
    if marks == ADDED:
        tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in [*MARKS, "<think>"]])
    made = without_transformers(tokenizer)
    return made, GrammarCompiler(made)


def use(*, required: bool = False, parallel: bool = True, allowed: Sequence[Function] = (GET, GET_ALL)) -> ToolUse:
    return ToolUse(functions=(GET, GET_ALL), allowed=tuple(allowed), is_required=required, is_parallel=parallel)


def taken(
    form: CallFormat, tools: ToolUse, text: str, answer: dict[str, Any] | None = None, marks: str = PLAIN_TEXT
) -> tuple[str, bool]:
    """As much of a text as the grammar takes, and whether it may end there. Marks are tokens if there are such."""
    tokenizer, grammars = compiler(marks)
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    added = {text: index for text, index in added.items() if text in {*MARKS, "<think>"}}
    named = {mark: added[mark] for mark in form.marks if mark in added and grammars.is_special(added[mark])}
    think = [added["<think>"]] if "<think>" in added else []
    spec = call_grammar(form, tools, answer, named=named, spoken=think)
    constraint = grammars.compile(spec).start()
    tokens: list[int] = []
    rest = text
    while rest:
        mark = next((mark for mark in added if rest.startswith(mark)), None)
        tokens += [added[mark]] if mark else tokenizer.encode(rest[0], add_special_tokens=False)
        rest = rest[len(mark or rest[0]) :]
    bits = np.zeros((len(tokenizer) + 31) // 32, np.int32)
    may_end, done = constraint.fill(bits), 0
    for token in tokens:
        if not bits[token // 32] >> (token % 32) & 1:
            break
        constraint.advance(token)
        may_end, done = constraint.fill(bits), done + 1
    return str(tokenizer.decode(tokens[:done], clean_up_tokenization_spaces=False)), may_end


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls(form: CallFormat, required: bool, parallel: bool) -> None:
    tools = use(required=required, parallel=parallel)
    for calls in ([ONE], [OTHER]):
        text = form.write(calls)
        assert taken(form, tools, text) == (text, True)
        for end in range(1, len(text)):
            begun = text.startswith(form.opening, 0, end) if form.opening else text[:end].startswith('{"name"')
            assert taken(form, tools, text[:end]) == (text[:end], not (required or begun))
    several = form.write([ONE, OTHER])
    found, may_end = taken(form, tools, several)
    assert (found == several) == (parallel and form is not LLAMA)
    assert may_end or form is MISTRAL  # whose list is still open


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_arguments_and_names(form: CallFormat) -> None:
    for call, good in [
        (("get", {"city": "Paris"}), '{"city": "'),
        (("get", {"town": "Rome"}), '{"'),
        (("set", {"city": "Rome"}), '{"name": "'),
    ]:
        text = form.write([call])
        found, may_end = taken(form, use(), text)
        assert text.startswith(found)
        assert found.endswith(good)
        assert not may_end


@pytest.mark.parametrize("form", FORMATS)
def test_text(form: CallFormat) -> None:
    for text in ["", "Hello", '{"a": 1}', "a < b <tool> [TOOL {", 'I said {"name": "get"}', "\n\n日本 😀"]:
        assert taken(form, use(), text) == (text, True)
        assert not taken(form, use(required=True), text)[1]


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
def test_text_around_calls(form: CallFormat) -> None:
    text = f"Let me see. {form.write([ONE])}"
    assert taken(form, use(), text) == (text, True)
    after = f"{text} Done."
    found = after if form is HERMES else text
    assert taken(form, use(), after) == (found, True)
    assert taken(form, use(parallel=False), after) == (text, True)


def test_some_of_the_functions() -> None:
    tools = use(required=True, allowed=[GET_ALL])
    assert taken(HERMES, tools, HERMES.write([OTHER])) == (HERMES.write([OTHER]), True)
    assert taken(HERMES, tools, HERMES.write([ONE]))[0].endswith('"get')


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
def test_json_or_calls(form: CallFormat) -> None:
    for text in ['{"n": 3}', form.write([ONE])]:
        assert taken(form, use(), text, ANSWER) == (text, True)
    assert taken(form, use(), "Hello", ANSWER) == ("", False)
    assert taken(form, use(required=True), '{"n": 3}', ANSWER) == ("", False)


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
@pytest.mark.parametrize("marks", [ADDED, SPECIAL])
def test_marks_that_are_tokens(form: CallFormat, marks: str) -> None:
    call = form.write([ONE])
    for tools, text in [(use(required=True), call), (use(), call), (use(), f"Well. {call}")]:
        assert taken(form, tools, text, marks=marks) == (text, True)
    texts = ["Hello", *(["<think>Hm.<think>", f"<think>Hm.<think> {call}"] if marks == ADDED else [])]
    for text in texts:
        assert taken(form, use(), text, marks=marks) == (text, True)
    assert taken(form, use(required=True), "Hello", marks=marks)[0] == ""
    assert taken(form, use(), f"{form.opening}Hello", marks=marks)[0] == form.opening


def test_schemas_are_closed_unless_they_speak_of_others() -> None:
    assert closed(CITY) == {**CITY, "additionalProperties": False}
    assert closed({}) == {"type": "object"}
    assert closed({"properties": {}}) == {"type": "object", "properties": {}, "additionalProperties": False}
    for open_schema in (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "anyOf": [CITY]},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"type": "object", "patternProperties": {"^x": {}}},
    ):
        assert closed(open_schema) == open_schema
    assert closed({"$ref": "#/$defs/a", "$defs": {"a": CITY}}) == {"$ref": "#/$defs/a", "$defs": {"a": CITY}}
