"""What is found in an answer doesn't depend on where it is cut, and is never an error."""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations, count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.serving.conversation.deltas import Arguments, Call, CallStart, Content, Delta, together
from layerskip.serving.conversation.formats import HERMES, LLAMA, MISTRAL, CallFormat
from layerskip.serving.conversation.parser import CallParser

NAMES = ["get", "get_all"]
GET = ("get", '{"city": "Paris"}')
ALL = ("get_all", "{}")
HARD = r'{"a": "}\"]{[\\", "b": [{"c": null}, []], "é": "\ud83d\ude00 😀 日本"}'

WHOLE: list[tuple[CallFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "", "", []),
    (HERMES, "Hello, world.\n", "Hello, world.\n", []),
    (HERMES, "1 < 2 <tool", "1 < 2 <tool", []),
    (HERMES, "a <tool_calls> b </tool_call>", "a <tool_calls> b </tool_call>", []),
    (HERMES, '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>', "", [GET]),
    (HERMES, f'<tool_call>\n{{"name": "get", "arguments": {HARD}}}\n</tool_call>', "", [("get", HARD)]),
    (
        HERMES,
        'Let me see.\n\n<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_all", "arguments": {}}\n</tool_call>\n',
        "Let me see.",
        [GET, ALL],
    ),
    (HERMES, '<tool_call>{"name": "get_all", "arguments": {}}</tool_call> So be it.', " So be it.", [ALL]),
    (
        HERMES,
        '<tool_call>[{"name": "get", "arguments": {"city": "Paris"}},\n {"name": "get_all", "arguments": {}}]'
        "</tool_call>",
        "",
        [GET, ALL],
    ),
    (HERMES, '<tool_call>{"name": "get_all", "parameters": {}, "id": 3}</tool_call>', "", [ALL]),
    (HERMES, '<tool_call> { "name" :"get_all" ,"arguments":{} } </tool_call>', "", [ALL]),
    (HERMES, '<tool_call>{"name": "get_all", "arguments": {}} and more', " and more", [ALL]),
    (MISTRAL, '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Paris"}}]', "", [GET]),
    (MISTRAL, 'Well. [TOOL_CALLS] [{"name": "get_all", "arguments": {}, "id": "abcdefghi"}]', "Well.", [ALL]),
    (MISTRAL, "a list: [TOOL, [1, 2]]", "a list: [TOOL, [1, 2]]", []),
    (LLAMA, '{"name": "get", "parameters": {"city": "Paris"}}', "", [GET]),
    (LLAMA, '\n {"name": "get_all", "parameters": {}}', "", [ALL]),
    (
        LLAMA,
        '<|python_tag|>{"name": "get_all", "parameters": {}}; {"name": "get", "parameters": {"city": "Paris"}}',
        "",
        [ALL, GET],
    ),
    (LLAMA, "  Hello {}", "  Hello {}", []),
    (LLAMA, '{"name": "Bob", "parameters": {}} is what I said', '{"name": "Bob", "parameters": {}} is what I said', []),
    (LLAMA, '{"city": "Paris"}', '{"city": "Paris"}', []),
    (LLAMA, "<|python|>", "<|python|>", []),
    (LLAMA, 'I say {"name": "get_all", "parameters": {}}', 'I say {"name": "get_all", "parameters": {}}', []),
]
"""Format, text, content and calls."""

BROKEN = [
    (HERMES, "<tool_call>\nfoo</tool_call>"),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"city": }}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"city": "Paris"'),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["get"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"x": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get"}</tool_call>'),
    (HERMES, '<tool_call>[{"name": "get_all", "arguments": {}}, 3]</tool_call>'),
    (HERMES, '<tool_call>[{"name": "get_all", "arguments": {}}, ]</tool_call>'),
    (HERMES, "<tool_call>[]</tool_call>"),
    (HERMES, "<tool_call>[[]]</tool_call>"),
    (HERMES, '<tool_call>{"a": ]}</tool_call>'),
    (HERMES, "a\n <tool_call>"),
    (HERMES, "a\n <tool_call>  "),
    (HERMES, "<tool_call>" + '{"a": ' * 30),
    (MISTRAL, '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Par'),
    (MISTRAL, "[TOOL_CALLS] no"),
    (LLAMA, '{"name": "get", "parameters": {"city": "Par'),
    (LLAMA, '<|python_tag|>import os; print("{}")'),
    (LLAMA, "[1, 2]"),
]
"""No calls at all: the whole text is content."""


def parse(form: CallFormat, pieces: Sequence[str], *, is_eager: bool) -> tuple[str, list[Call]]:
    numbers = count()
    parser = CallParser(form, NAMES, is_eager=is_eager, make_id=lambda: f"call_{next(numbers)}")
    found = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content, calls = together(found)
    assert parser.num_calls == len(calls)
    assert [delta.index for delta in found if isinstance(delta, CallStart)] == list(range(len(calls)))
    return content, calls


def cuts(text: str) -> Iterator[list[str]]:
    """A text in one piece, in two at every place, in three at every two places, and in single characters."""
    yield [text]
    yield list(text)
    places = range(1, len(text))
    yield from ([text[:a], text[a:]] for a in places)
    if len(text) < 100:
        yield from ([text[:a], text[a:b], text[b:]] for a, b in combinations(places, 2))


@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize(("form", "text", "content", "calls"), WHOLE)
def test_every_cut_gives_the_same(
    form: CallFormat, text: str, content: str, calls: list[tuple[str, str]], is_eager: bool
) -> None:
    for pieces in cuts(text):
        found, made = parse(form, pieces, is_eager=is_eager)
        assert found == content, pieces
        assert [(call.name, json.loads(call.arguments)) for call in made] == [(n, json.loads(a)) for n, a in calls]
        assert [call.id for call in made] == [f"call_{place}" for place in range(len(calls))]
        if is_eager:
            assert [call.arguments for call in made] == [arguments for _, arguments in calls]


@pytest.mark.parametrize(("form", "text"), BROKEN)
def test_broken_calls_are_content(form: CallFormat, text: str) -> None:
    for pieces in cuts(text):
        assert parse(form, pieces, is_eager=False) == (text, []), pieces


def test_a_broken_call_before_a_whole_one() -> None:
    whole = '<tool_call>{"name": "get_all", "arguments": {}}</tool_call>'
    for text, content in [
        (f"<tool_call>oh {whole}", "<tool_call>oh"),
        (f'<tool_call>{{"name": {whole}', '<tool_call>{"name":'),
        (f"{whole}<tool_call>no", "<tool_call>no"),
    ]:
        for pieces in cuts(text):
            found, calls = parse(HERMES, pieces, is_eager=False)
            assert (found, [call.name for call in calls]) == (content, ["get_all"]), pieces


@pytest.mark.parametrize(
    ("form", "front"),
    [
        (HERMES, '<tool_call>\n{"name": "get", "arguments": '),
        (MISTRAL, '[TOOL_CALLS][{"name": "get", "arguments": '),
        (LLAMA, '{"name": "get", "parameters": '),
    ],
)
def test_arguments_are_given_as_they_come(form: CallFormat, front: str) -> None:
    parser = CallParser(form, NAMES, is_eager=True, make_id=lambda: "call_0")
    assert parser.push(front) == []
    assert parser.push('{"ci') == [CallStart(index=0, id="call_0", name="get"), Arguments(index=0, text='{"ci')]
    assert parser.push('ty": "}') == [Arguments(index=0, text='ty": "}')]
    assert parser.finish() == []  # cut off by a limit


def test_calls_that_are_held_back_come_whole() -> None:
    parser = CallParser(HERMES, NAMES, is_eager=False, make_id=lambda: "call_0")
    text = '<tool_call>{"name": "get", "arguments": {"city": "Paris"}}'
    found: list[Delta] = [delta for character in text[:-1] for delta in parser.push(character)]
    assert found == []
    assert parser.push("}") == [
        CallStart(index=0, id="call_0", name="get"),
        Arguments(index=0, text='{"city": "Paris"}'),
    ]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = CallParser(HERMES, NAMES, is_eager=True)
    assert parser.push("Hello ") == [Content(text="Hello")]
    assert parser.push("<tool") == []
    assert parser.push("box") == [Content(text=" <toolbox")]


def test_arguments_in_a_string_and_halves_of_characters() -> None:
    inside = json.dumps('{"city": "Paris"}')
    content, calls = parse(HERMES, [f'<tool_call>{{"name": "get", "arguments": {inside}}}</tool_call>'], is_eager=False)
    assert (content, calls[0].arguments) == ("", '{"city": "Paris"}')
    half = r'<tool_call>{"name": "get", "arguments": {"city": "\ud83d"}}</tool_call>'
    _, (call,) = parse(HERMES, [half], is_eager=False)
    assert json.loads(call.arguments.encode()) == {"city": "\ud83d"}


PARTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<tool",
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        " ",
        "\n",
        '"',
    ),
    *('"name": ', '"get"', '"arguments": ', '{"a": 1}', '"parameters": ', "\\", "x", "é", "\ud83d", ":", '"get_all"'),
    *('{"name": "get", "arguments": {', '{"name": "get", "parameters": {}}', '{"name": "get_all", "arguments": {}}'),
]


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from([HERMES, MISTRAL, LLAMA]),
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.lists(st.integers(0, 200), max_size=6),
    st.booleans(),
)
def test_any_text_with_any_cuts(form: CallFormat, text: str, places: list[int], is_eager: bool) -> None:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    whole = parse(form, [text], is_eager=is_eager)
    assert parse(form, pieces, is_eager=is_eager) == whole
    assert parse(form, list(text), is_eager=is_eager) == whole
    content, calls = whole
    if not calls:
        assert content == text
    if not is_eager:
        assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
