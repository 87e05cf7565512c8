"""What an answer may look like, as a grammar: calls whose arguments fit their schemas, text, or JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.serving.conversation.formats import CallFormat
from layerskip.serving.conversation.tools import ToolUse
from layerskip.structured.spec import GrammarSpec

OPEN_SCHEMA = frozenset(
    "additionalProperties unevaluatedProperties patternProperties propertyNames $ref $dynamicRef allOf anyOf oneOf not "
    "if then else dependentSchemas".split()
)
"""Keywords beside which `properties` may not be all that there is."""
WHITE = r"[ \t\r\n]*"
NEW_LINE = '"\\n"'


def call_grammar(
    form: CallFormat,
    tools: ToolUse,
    answer: Mapping[str, Any] | None,
    *,
    named: Mapping[str, int] | None = None,
    spoken: Sequence[int] = (),
) -> GrammarSpec:
    """An answer in which what begins like a call is one.

    Args:
        form: How calls are written.
        tools: What may be called, and whether something must be.
        answer: Schema of an answer that isn't a call; None: any text.
        named: Marks of the format that grammars know by their ids alone, and these.
        spoken: Ids of other such tokens that text may have.

    Raises:
        GrammarError: A schema can't be written as JSON.
    """
    schemas = {f"args_{place}": closed(function.schema) for place, function in enumerate(tools.allowed)}
    heads = [_literal(form.head(function.name)) for function in tools.allowed]
    calls = [f"{head} @{name} {_literal('}')}" for head, name in zip(heads, schemas, strict=True)]
    rules = _Rules(form, tools, named or {}, spoken)
    start = rules.calls() if tools.is_required else rules.calls_or_text() if answer is None else rules.calls_or_json()
    if answer is not None and not tools.is_required:
        schemas["answer"] = answer
    lines = ["%llguidance {}", *start, f"one: {' | '.join(calls)}"]
    return GrammarSpec.lark("\n".join(lines) + "\n", schemas)


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of arguments; where it lists properties and doesn't speak of others, without others."""
    made = dict(schema) if "$ref" in schema else {"type": "object", **schema}
    listed, required = made.get("properties"), made.get("required", ())
    if not isinstance(listed, dict) or not OPEN_SCHEMA.isdisjoint(made):
        return made
    if isinstance(required, list | tuple) and all(isinstance(name, str) and name in listed for name in required):
        return {**made, "additionalProperties": False}
    return made


class _Rules:
    """Rules of all but a call itself (`one`)."""

    def __init__(self, form: CallFormat, tools: ToolUse, named: Mapping[str, int], spoken: Sequence[int]) -> None:
        self._form, self._tools, self._named, self._spoken = form, tools, named, spoken

    def calls(self) -> list[str]:
        """Nothing but calls."""
        return [f"start: {self._all_calls}", *self._block]

    def calls_or_json(self) -> list[str]:
        """Calls, or JSON that fits a schema."""
        return [f"start: {self._all_calls} | @answer", *self._block]

    def calls_or_text(self) -> list[str]:
        """Calls, with text before them and, where several may be made, around them; or text alone."""
        form = self._form
        if not form.opening:
            begun = rf'{WHITE}\{{{WHITE}"name"(.|\n)*'
            return ["start: one | free TEXT?", *self._text(begun)]
        text = self._text(rf"(.|\n)*{_escaped(form.opening)}(.|\n)*")
        if form.opening in self._named:
            return [f"start: free TEXT? ({self._all_calls})?", *text, *self._block]
        start = "start: (free open block)* free TEXT?" if self._are_several else "start: free (open block | TEXT)?"
        return [start, f"open[lazy]: /(.|\\n)*/ {self._mark(form.opening)}", *text, *self._block]

    @property
    def _are_several(self) -> bool:
        """Whether several calls may be written, each with its own mark."""
        return self._tools.is_parallel and not self._form.is_list

    @property
    def _all_calls(self) -> str:
        if not self._form.opening:
            return "one"
        opening = self._mark(self._form.opening)
        more = f" ({NEW_LINE} {opening} block)*" if self._are_several else ""
        return f"{opening} block{more}"

    @property
    def _block(self) -> list[str]:
        """What follows a mark, up to the mark behind the calls."""
        form = self._form
        if not form.opening:
            return []
        gap = [_literal(form.gap)] if form.gap else []
        inside = ["one"]
        if form.is_list:
            others = [f"({_literal(', ')} one)*"] if self._tools.is_parallel else []
            inside = [_literal("["), "one", *others, _literal("]")]
        end = [*gap, self._mark(form.closing)] if form.closing else []
        return [" ".join(["block:", *gap, *inside, *end])]

    def _text(self, begun: str) -> list[str]:
        """Text in which no call has begun, and tokens in it that grammars know by their ids."""
        ids = " | ".join(f"<[{token}]>" for token in self._spoken)
        free = f"free: (TEXT? ({ids}))*" if ids else 'free: ""'
        return [free, rf"TEXT: /(.|\n)+/ & ~/{begun}/"]

    def _mark(self, text: str) -> str:
        """A mark: a token, or its text."""
        return f"<[{self._named[text]}]>" if text in self._named else _literal(text)


def _literal(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """A text as a regular expression between slashes."""
    return "".join(c if c.isalnum() or c in "_<>" else f"\\{c}" for c in text)
