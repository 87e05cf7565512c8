"""Chat templates give what transformers' rendering gives: text, or the same error."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hub_folders import DATA, NAMES
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from layerskip.text.rendering import render_template

QUESTION = {"role": "user", "content": "Où est la réponse? <b> 😀 "}
ANSWER = {"role": "assistant", "content": "  Here. "}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "clock", "description": "où", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {"a": 1}}}]}
NEWER_CONVERSATIONS = [
    [QUESTION, CALL, {"role": "tool", "name": "clock", "content": "12:00"}],
    [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "Yes.", "thinking": "Hm."}],
    [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning": "Hm.", "thinking": None}],
]
"""With what is left open, and reasoning under several names: transformers 5.17 hands them over as they are."""
CONVERSATIONS = [
    [QUESTION],
    [SYSTEM, QUESTION],
    [QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER, QUESTION],
    [{"role": "user", "content": [{"type": "text", "text": "Look!"}, {"type": "image"}]}],
    [{"role": "user", "content": ("a", "b"), "weight": 0.5, "seen": True}],
    [{"role": "odd", "content": ""}],
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{%- for m in messages -%}\n  {{ m['content'] | trim }}\n"
    "{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 2 %}"
    "{{ m.content }}{{ x }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ x }}{% endfor %}",
    "JSON": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=True) }}"
    "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}",
    "dates": "{{ strftime_now('%Y-%m') }}",
    "refusal": "{{ raise_exception('no\\nway: ' + messages[0].role) }}",
    "namespace": "{% set ns = namespace(self=1, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}{{ ns.missing }}",
    "a namespace into Python": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "a namespace made into Python": "{{ namespace(__init__=1) }}",
    "dict": "{{ dict(a=1, b=[2]) | tojson }}{{ dict.fromkeys(['a', 'b'], 0) }}{{ dict([('c', 3)]).c }}",
    "dict into Python": "{{ dict.__subclasses__() }}{{ dict.mro() }}",
    "a class into Python": "{{ ().__class__.__base__.__subclasses__() }}",
    "a change": "{{ messages.append({}) }}",
    "a format into Python": "{{ '{0.__class__}'.format(messages) }}",
    "variables": "{{ bos_token }}{{ eos_token }}{{ date_string }}{{ enable_thinking is defined }}{{ documents }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}",
    "what is open": "{% for m in messages %}{{ 'content' in m }}{{ m.keys() | list }}{% endfor %}",
    "tools": "{% for t in tools or [] %}[{{ t.function.name }} {{ t.function.description }}]{% endfor %}{{ tools }}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}",
    "nothing": "",
    "macro": "{% macro say(m) %}<{{ m.content }}>{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | unique | join(', ') }}"
    "{{ messages[0].content | upper | replace('O', 'u') }}",
    "prompt": "{% if add_generation_prompt %}answer:{% endif %}",
    "undefined": "{{ messages[9].content.more }}",
    "no number": "{{ 1 / 0 }}",
    "too much": "{% for i in range(10**9) %}{% endfor %}",
    "broken": "{% if %}",
    "an unknown filter": "{{ messages | shout }}",
}
TEMPLATES |= {
    name: json.loads((DATA / name / "tokenizer_config.json").read_text("utf-8"))["chat_template"] for name in NAMES
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024", "enable_thinking": False}


def outcome(render: Callable[[], str]) -> tuple[type, str]:
    """The text, or the error without our and transformers' own names."""
    try:
        return str, render()
    except SecurityError as error:
        return type(error), ""
    except Exception as error:
        return type(error), re.sub(r"'[\w.]+ object'", "an object", str(error))


def theirs(
    template: str, conversation: Sequence[Any], variables: Mapping[str, Any], **options: Any
) -> tuple[type, str]:
    tokenizer = PreTrainedTokenizerBase()
    options = {"chat_template": template, "tokenize": False, **options, **variables}
    return outcome(lambda: tokenizer.apply_chat_template(conversation, **options))


def ours(template: str, conversation: Sequence[Any], variables: Mapping[str, Any], **options: Any) -> tuple[type, str]:
    return outcome(lambda: render_template(template, conversation, variables=variables, **options))


IS_NEWER = theirs("{{ 'content' in messages[0] }}", [CALL], {}) == (str, "False")
"""Whether transformers' renderer is as new as the one that ours is like."""
SKIPPED = () if IS_NEWER else ("a namespace into Python", "a namespace made into Python", "dict into Python")
"""Templates that only newer renderers refuse."""


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering must do without."""
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase", None)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in SKIPPED])
class TestSameAsTransformers:
    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    def test_conversations(self, name: str, add_generation_prompt: bool) -> None:
        for conversation in [*CONVERSATIONS, *(NEWER_CONVERSATIONS if IS_NEWER else [])]:
            for variables in (VARIABLES, {}):
                given = TEMPLATES[name], conversation, variables
                expected = theirs(*given, add_generation_prompt=add_generation_prompt)
                assert ours(*given, add_generation_prompt=add_generation_prompt) == expected

    def test_tools_and_documents(self, name: str) -> None:
        template = TEMPLATES[name]
        options = {"tools": [TOOL, TOOL], "documents": [{"title": "One", "text": "1"}]}
        assert ours(template, [QUESTION], VARIABLES, **options) == theirs(template, [QUESTION], VARIABLES, **options)
        empty: dict[str, list[Any]] = {"tools": [], "documents": []}
        assert ours(template, [QUESTION], {}, **empty) == theirs(template, [QUESTION], {}, **empty)

    def test_a_message_that_goes_on(self, name: str) -> None:
        for conversation in ([QUESTION, ANSWER], [QUESTION]):
            given = TEMPLATES[name], conversation, VARIABLES
            assert ours(*given, continue_final_message=True) == theirs(*given, continue_final_message=True)


def clock(zone: str) -> str:
    """Tell the time.

    Args:
        zone: Where.
    """
    return zone


@dataclass
class Object:
    role: str
    content: Any


@pytest.mark.parametrize(
    ("conversation", "options", "variables"),
    [
        ([QUESTION], {"tools": [clock]}, {}),
        ([QUESTION], {"tools": ["clock"]}, {}),
        ([QUESTION], {"documents": ["text"]}, {}),
        ([Object("user", "Hello!")], {}, {}),
        ([{"role": "user", "content": Object("a", object)}], {}, {}),
        ([{"role": "user", "content": np.float32(0.5)}], {}, {}),
        ([{"role": "user", "content": MappingProxyType({"text": "a"})}], {}, {}),
        ([QUESTION], {}, {"date_string": object}),
    ],
)
def test_what_is_not_plain_data_is_left_to_transformers(
    conversation: list[Any], options: dict[str, Any], variables: dict[str, Any]
) -> None:
    for template in (TEMPLATES["plain"], TEMPLATES["tools"], TEMPLATES["variables"], TEMPLATES["documents"]):
        expected = theirs(template, conversation, variables, **options)
        assert outcome(lambda: render_template(template, conversation, variables=variables, **options)) == expected  # noqa: B023


@pytest.mark.usefixtures("without_transformers")
def test_plain_data_needs_no_transformers() -> None:
    assert render_template(TEMPLATES["plain"], [QUESTION], tools=[TOOL], variables=VARIABLES) == (
        f"user: {QUESTION['content']}\n"
    )
    with pytest.raises(TypeError):  # what the fixture leaves of transformers
        render_template(TEMPLATES["plain"], [QUESTION], tools=[clock], variables=VARIABLES)


def test_an_empty_conversation() -> None:
    with pytest.raises(ValueError, match="empty conversation"):
        render_template("", [], variables={})


def test_messages_stay_as_they_are() -> None:
    message = {"role": "assistant", "content": "a", "thinking": "b", "name": None}
    before = dict(message)
    render_template(TEMPLATES["plain"], [message], variables={})
    assert message == before
