"""From a conversation to what the engine is asked, and from the engine's text to an answer."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from layerskip.decoding.request import Request
from layerskip.errors import GrammarError, LayerSkipError
from layerskip.language_model import LanguageModel
from layerskip.serving.config import RequestLimits
from layerskip.serving.conversation.grammar import call_grammar, closed
from layerskip.serving.conversation.parser import CallParser, PlainText
from layerskip.serving.conversation.prompts import templated
from layerskip.serving.conversation.styles import ToolStyle
from layerskip.serving.conversation.tools import ToolUse, schema_bytes
from layerskip.serving.protocol.errors import ApiError
from layerskip.structured.compiler import GrammarCompiler
from layerskip.structured.grammar import Grammar
from layerskip.structured.spec import GrammarLimits, GrammarSpec

SCHEMAS = 4
"""All schemas of a request together may have so many times the bytes of one."""


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The form that a request wants for answers that aren't calls."""

    schema: Mapping[str, Any]
    """JSON schema."""
    param: str
    """Where it stands in the request."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is needed for the assistant's next message."""

    prompt: Sequence[int]
    grammar: Grammar | None
    """What the answer is held to. Where calls may be made, it is missing only if the tokenizer suits no grammars; what
    is no call of a known function by its form is text then."""
    tools: ToolUse | None
    style: ToolStyle | None
    """How calls are written; None if there may be none."""

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are marks of calls, and their texts."""
        return {} if self.style is None else self.style.shown

    def parser(self) -> CallParser | PlainText:
        """Reads one answer."""
        if self.style is None or self.tools is None:
            return PlainText()
        names = [function.name for function in self.tools.allowed]
        return CallParser(self.style.form, names, is_eager=self.grammar is not None)

    def constrained(self, requests: Sequence[Request]) -> list[Request]:
        """Requests that are held to the grammar, each by a constraint of its own."""
        if self.grammar is None:
            return list(requests)
        return [replace(request, constraint=self.grammar.start()) for request in requests]


class Conversations:
    """Makes turns for one model; any thread may call it."""

    def __init__(self, lm: LanguageModel, limits: RequestLimits) -> None:
        """Prepare; template and tokenizer are looked at when they are first needed."""
        self._lm, self._limits, self._lock = lm, limits, Lock()
        allowed = GrammarLimits(max_bytes=SCHEMAS * limits.schema_bytes)
        self._compiler = GrammarCompiler(lm.text_tokenizer, allowed)
        self._style: ToolStyle | None = None

    def prepare(self) -> None:
        """Look at template and tokenizer now; what is wrong with them is said when they are needed."""
        with suppress(LayerSkipError):
            _ = self.style
            self._compiler.prepare()

    def close(self) -> None:
        """Let the threads of the compiler end."""
        self._compiler.close()

    @property
    def style(self) -> ToolStyle:
        """How the model is told of functions."""
        with self._lock:
            if self._style is None:
                self._style = ToolStyle.of(self._lm.text_tokenizer)
            return self._style

    def turn(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: ToolUse | None = None,
        answer: AnswerFormat | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Turn:
        """A prompt and a grammar; takes from a millisecond to seconds.

        Args:
            messages: As transformers has them, from `to_messages`.
            tools: What the model may call.
            answer: The form of an answer that isn't a call.
            variables: Of the template, from `template_variables`.

        Raises:
            ApiError: A schema can't be compiled.
            PromptError: The template doesn't take the conversation.
            TokenizerError: The model has no template.
        """
        described = None
        if tools is not None or any(is_about_calls(message) for message in messages):
            messages, described = templated(messages, self.style, tools)
        prompt = self._lm.encode_chat(messages, tools=described, variables=variables)
        return Turn(
            prompt=prompt,
            grammar=self._grammar(tools, answer),
            tools=tools,
            style=None if tools is None else self.style,
        )

    def _grammar(self, tools: ToolUse | None, answer: AnswerFormat | None) -> Grammar | None:
        if answer is not None and schema_bytes(answer.schema) > self._limits.schema_bytes:
            message = f"a schema may have {self._limits.schema_bytes} bytes, got {schema_bytes(answer.schema)}"
            raise _refused(message, answer.param)
        if tools is not None:
            return self._grammar_of_calls(tools, answer)
        return None if answer is None else self._compiled(GrammarSpec.json_schema(answer.schema), answer.param)

    def _grammar_of_calls(self, tools: ToolUse, answer: AnswerFormat | None) -> Grammar | None:
        style = self.style
        try:
            self._compiler.prepare()
        except GrammarError as error:  # none of this tokenizer's texts can be held to a grammar
            if tools.is_required or answer is not None:
                raise _refused(str(error), "tool_choice" if answer is None else answer.param) from error
            return None
        if answer is not None and not tools.is_required and not style.form.opening:
            message = (
                f"this model's calls are JSON like the answer that {answer.param} asks for, and can't be told from it; "
                "leave out one of the two, or set tool_choice to required"
            )
            raise _refused(message, answer.param)
        try:
            named = {text: token for text, token in style.marks.items() if self._compiler.is_special(token)}
            spoken = [token for token in style.spoken if self._compiler.is_special(token)]
            schema = None if answer is None else answer.schema
            spec = call_grammar(style.form, tools, schema, named=named, spoken=spoken)
            return self._compiler.compile(spec)
        except GrammarError as error:
            for function in tools.allowed:  # which of the schemas is it?
                self._compiled(GrammarSpec.json_schema(closed(function.schema)), function.param)
            if answer is not None:
                self._compiled(GrammarSpec.json_schema(answer.schema), answer.param)
            raise _refused(str(error), "tools") from error

    def _compiled(self, spec: GrammarSpec, param: str) -> Grammar:
        try:
            return self._compiler.compile(spec)
        except GrammarError as error:
            raise _refused(str(error), param) from error


def is_about_calls(message: Mapping[str, Any]) -> bool:
    """Whether a message is a call or a call's result."""
    return message["role"] == "tool" or "tool_calls" in message


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
