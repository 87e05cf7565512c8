"""Grammars from specifications: checked, compiled off the caller's thread within limits, and kept for the next request.

JSON has no white space but what is useful: between two parts of it one space, or a new line and up to 16 spaces. Models
that aren't sure what comes next would otherwise write white space without end.
"""

import json
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from threading import Lock
from typing import TYPE_CHECKING, Any

from layerskip.errors import GrammarError, brief
from layerskip.structured.grammar import Grammar
from layerskip.structured.spec import CheckedSpec, GrammarLimits, GrammarSpec
from layerskip.structured.vocabulary import grammar_tokenizer, import_llguidance
from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

JSON_SPACE = r"( |\n {0,16})?"
"""What may stand between two parts of JSON."""
MOST_KEPT = 128
"""Compiled grammars that are kept."""
THREADS = 2
"""Compilations at once. One that takes too long can't be stopped, and holds its thread until llguidance's own limits
end it; others then wait, within their own seconds."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer; any thread may call it."""

    def __init__(
        self, tokenizer: Tokenizer, limits: GrammarLimits | None = None, *, most_kept: int = MOST_KEPT
    ) -> None:
        """Prepare; the tokenizer is read when the first grammar is compiled, or by `prepare`.

        Args:
            tokenizer: The checkpoint's (`LanguageModel.text_tokenizer`).
            limits: What a grammar may take.
            most_kept: Compiled grammars to keep; the least recently used goes first.
        """
        self.limits = limits or GrammarLimits()
        self._tokenizer, self._most_kept = tokenizer, most_kept
        self._lock, self._reading = Lock(), Lock()
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._vocabulary: tuple[LLTokenizer, int] | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="layerskip-grammar")

    def prepare(self) -> "GrammarCompiler":
        """Read the tokenizer now, which takes from a few milliseconds to a second; returns the compiler.

        Raises:
            GrammarError: It can't be used, or llguidance isn't installed.
        """
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = grammar_tokenizer(self._tokenizer)
        return self

    def is_special(self, token: int) -> bool:
        """Whether grammars know a token by its id alone (`<[id]>`), not by its text: tokens named `<...>` among others.

        Raises:
            GrammarError: As `prepare`.
        """
        self.prepare()
        assert self._vocabulary is not None
        return bool(self._vocabulary[0].is_special_token(token))

    def compile(self, spec: GrammarSpec) -> Grammar:
        """A grammar, from those that are kept or compiled; waits for it.

        Raises:
            GrammarError: It is beyond a limit, can't be understood, or has a keyword that can't be enforced.
        """
        with self._lock:
            grammar = self._kept.get(spec)
            if grammar is not None:
                self._kept.move_to_end(spec)
                return grammar
        checked = spec.checked(self.limits)
        self.prepare()
        try:
            grammar = self._threads.submit(self._compile, checked).result(self.limits.seconds)
        except TooSlow:
            raise GrammarError(
                f"the grammar took longer than {self.limits.seconds:g} seconds to compile; make it smaller"
            ) from None
        with self._lock:
            self._kept[spec] = grammar
            self._kept.move_to_end(spec)
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        return grammar

    def close(self) -> None:
        """Let the threads end; nothing can be compiled afterwards."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, checked: CheckedSpec) -> Grammar:
        llguidance = import_llguidance()
        assert self._vocabulary is not None
        tokenizer, end = self._vocabulary
        try:
            limits = llguidance.LLParserLimits(verbose_errors=False)
            matcher = llguidance.LLMatcher(tokenizer, _definition(checked), log_level=0, limits=limits)
            tried = matcher.deep_copy()
            tried.compute_bitmask()  # what is too complex from the start, or has no beginning, is found here
        except ValueError as error:
            raise GrammarError(_told(brief(error))) from error
        if tried.is_error():
            raise GrammarError(_told(brief(ValueError(tried.get_error()))))
        return Grammar(matcher, end, tokenizer.vocab_size)


def _definition(checked: CheckedSpec) -> str:
    """The grammar in llguidance's own format."""
    spec = checked.spec
    if spec.kind == "regex":
        return str(import_llguidance().LLMatcher.grammar_from_regex(spec.text))
    schemas = [{"name": name or "json", "json_schema": _spaced(schema)} for name, schema in checked.schemas.items()]
    start = [{"name": "start", "lark_grammar": spec.text}] if spec.kind == "lark" else []
    return json.dumps({"grammars": [*start, *schemas]})


def _spaced(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with our rules of white space; a client's own options of compilation are dropped."""
    rest = {name: value for name, value in schema.items() if name != "x-guidance"}
    return {**rest, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": JSON_SPACE}}


def _told(problem: str) -> str:
    if "Unimplemented keys" in problem:
        keys = problem.partition("[")[2].partition("]")[0]
        return f"the JSON schema has keywords that can't be enforced: {keys}; leave them out"
    if "oneOf" in problem:
        return "the JSON schema has a oneOf whose cases might hold at once, which can't be enforced; use anyOf"
    if problem.startswith("NoExtension"):
        problem = "no text has this form"
    return f"the grammar can't be compiled: {problem}"
