"""What an answer may look like, as a grammar: calls whose arguments fit their schemas, text, or JSON."""

import json
from collections.abc import Mapping
from typing import Any

from layerskip.serving.conversation.styles import ToolStyle
from layerskip.serving.conversation.tools import ToolUse
from layerskip.structured.spec import GrammarSpec

OPEN_SCHEMA = frozenset(
    "additionalProperties unevaluatedProperties patternProperties propertyNames $ref $dynamicRef allOf anyOf oneOf not "
    "if then else dependentSchemas".split()
)
"""Keywords beside which `properties` may not be all that there is."""
ANY = r"/(.|\n)*/"
NEW_LINE = '"\\n"'


def call_grammar(style: ToolStyle, tools: ToolUse, answer: Mapping[str, Any] | None) -> GrammarSpec:
    """An answer in which what begins like a call is one.

    Args:
        style: How calls are written.
        tools: What may be called, and whether something must be.
        answer: Schema of an answer that isn't a call; None: any text.

    Raises:
        GrammarError: A schema can't be written as JSON.
    """
    form = style.form
    schemas = {f"args_{place}": closed(function.schema) for place, function in enumerate(tools.allowed)}
    heads = [_literal(form.head(function.name)) for function in tools.allowed]
    calls = [f"{head} @{name} {_literal('}')}" for head, name in zip(heads, schemas, strict=True)]
    rules = ["%llguidance {}", *_start(style, tools, is_text=answer is None), f"one: {' | '.join(calls)}"]
    if answer is not None and not tools.is_required:
        schemas["answer"] = answer
    return GrammarSpec.lark("\n".join(rules) + "\n", schemas)


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of arguments without others than those that it names, where it doesn't speak of others."""
    made = dict(schema) if "$ref" in schema else {"type": "object", **schema}
    return {**made, "additionalProperties": False} if OPEN_SCHEMA.isdisjoint(made) else made


def _start(style: ToolStyle, tools: ToolUse, *, is_text: bool) -> list[str]:
    """Rules of all but a call itself (`one`)."""
    form = style.form
    if not form.opening:
        if tools.is_required:
            return ["start: one"]
        white = r"[ \t\r\n]*"
        return ["start: one | TEXT", rf'TEXT: {ANY} & ~/{white}\{{{white}"name"(.|\n)*/']
    opening = _mark(form.opening, style)
    block = f"block: {_block(style, is_parallel=tools.is_parallel)}"
    more = f"({NEW_LINE} {opening} block)*" if tools.is_parallel and not form.is_list else ""
    calls = f"calls: {opening} block {more}".rstrip()
    if tools.is_required:
        return ["start: calls", calls, block]
    if not is_text:
        return ["start: calls | @answer", calls, block]
    if form.opening in style.special:  # ordinary text has no special tokens
        return ["start: TEXT calls?", f"TEXT: {ANY}", calls, block]
    start = "start: (open block)* TEXT" if more else "start: open block | TEXT"
    text = rf"TEXT: {ANY} & ~/(.|\n)*{_escaped(form.opening)}(.|\n)*/"
    return [start, text, f"open[lazy]: {ANY} {opening}", block]


def _block(style: ToolStyle, *, is_parallel: bool) -> str:
    """What follows a mark, up to the mark behind the calls."""
    form = style.form
    gap = [_literal(form.gap)] if form.gap else []
    inside = ["one"]
    if form.is_list:
        others = [f"({_literal(', ')} one)*"] if is_parallel else []
        inside = [_literal("["), "one", *others, _literal("]")]
    end = [*gap, _mark(form.closing, style)] if form.closing else []
    return " ".join([*gap, *inside, *end])


def _mark(text: str, style: ToolStyle) -> str:
    """A mark: a special token, or its text."""
    return f"<[{style.special[text]}]>" if text in style.special else _literal(text)


def _literal(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """A text as a regular expression between slashes."""
    return "".join(c if c.isalnum() or c in "_<>" else f"\\{c}" for c in text)
