"""How a model is told of functions, and how it writes calls: found out from its chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerskip.errors import PromptError, TokenizerError
from layerskip.serving.conversation.deltas import together
from layerskip.serving.conversation.formats import FORMATS, HERMES, WHITE, CallFormat
from layerskip.serving.conversation.parser import CallParser
from layerskip.text.chat_template import render
from layerskip.text.detokenizer import special_tokens
from layerskip.text.tokenizer import Tokenizer

QUESTION, RESULT = "Which xylophone?", "Quixotically"
NAME, ARGUMENTS = "find_xylophone", {"key": "zygote"}
CALL_ID = "Xy1oPh0ne"
"""Nine letters and digits: Mistral's templates want that."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "Its key."}}},
    },
}
PROBE_CALL = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
"""A conversation that is rendered to see what the template makes of calls."""


@dataclass(frozen=True, kw_only=True)
class ToolStyle:
    """How functions, calls and their results are put to a model."""

    form: CallFormat
    is_native: bool
    """Whether the template writes them. Where it can't, or writes calls in no way that is known here, they are written
    into the messages, in Hermes' form."""
    has_system: bool
    """Whether the template takes a system message."""
    marks: Mapping[str, int]
    """The format's marks that are tokens of their own, and their ids."""
    shown: Mapping[int, str]
    """Those of them that usually give no text, being special tokens."""
    spoken: tuple[int, ...]
    """Other added tokens, as far as they give text, such as `<think>`."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ToolStyle":
        """Ask a tokenizer's template."""
        found = _native_format(tokenizer)
        form = found or HERMES
        system = _rendered(tokenizer, [{"role": "system", "content": RESULT}, {"role": "user", "content": QUESTION}])
        silent, added = special_tokens(tokenizer), tokenizer.added_tokens_decoder
        marks = {str(token): index for index, token in added.items() if str(token) in form.marks}
        return cls(
            form=form,
            is_native=found is not None,
            has_system=RESULT in system,
            marks=marks,
            shown={index: text for text, index in marks.items() if index in silent},
            spoken=tuple(index for index in added if index not in silent and index not in marks.values()),
        )


def _native_format(tokenizer: Tokenizer) -> CallFormat | None:
    """The format in which a template writes calls; None if it takes no tools, or writes them otherwise."""
    question = {"role": "user", "content": QUESTION}
    asked = _rendered(tokenizer, [question], tools=[PROBE_TOOL], add_generation_prompt=True)
    if not asked or asked == _rendered(tokenizer, [question], add_generation_prompt=True):
        return None
    call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
    result = {"role": "tool", "name": NAME, "tool_call_id": CALL_ID, "content": RESULT}
    answered = _rendered(tokenizer, [question, call, result], tools=[PROBE_TOOL], add_generation_prompt=True)
    before, found, _ = answered.partition(RESULT)
    opening = asked.rpartition(QUESTION)[2]
    answer = before.rpartition(QUESTION)[2].removeprefix(opening)
    if not found:
        return None
    return next((_adjusted(form, answer) for form in FORMATS if _is_written(form, answer)), None)


def _is_written(form: CallFormat, answer: str) -> bool:
    """Whether a text holds the probe's call in a format."""
    parser = CallParser(form, [NAME], is_eager=False)
    content, calls = together([*parser.push(answer), *parser.finish()])
    return form.key in answer and NAME not in content and [json.loads(call.arguments) for call in calls] == [ARGUMENTS]


def _adjusted(form: CallFormat, answer: str) -> CallFormat:
    """A format with the white space that the template writes behind the mark."""
    if not form.opening:
        return form
    rest = answer.partition(form.opening)[2]
    return replace(form, gap=rest[: len(rest) - len(rest.lstrip(WHITE))])


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation as the template writes it; nothing where it can't."""
    try:
        return render(tokenizer, messages, **options)
    except (TokenizerError, PromptError):
        return ""
