"""Compiling grammars: what is refused and why, what is kept, from any thread."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from schemas import SCHEMAS
from tiny_tokenizers import byte_fallback, byte_level, slow, unigram, without_transformers, word_piece
from tokenizers import Tokenizer as Backend

from layerskip.errors import ConstraintError, GrammarError, InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.structured import compiler as compiler_module
from layerskip.structured.compiler import GrammarCompiler
from layerskip.structured.grammar import Grammar
from layerskip.structured.spec import GrammarLimits, GrammarSpec
from layerskip.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def compiler(demo: LanguageModel) -> GrammarCompiler:
    return GrammarCompiler(demo.text_tokenizer)


def allowed(grammar: Grammar, tokens: list[int], size: int) -> tuple[set[int], bool]:
    """What may follow some tokens, and whether the text may end."""
    constraint, bits = grammar.start(), np.full((size + 31) // 32, -1, np.int32)
    for token in tokens:
        constraint.fill(bits)
        constraint.advance(token)
    may_end = constraint.fill(bits)
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(flags).tolist()), may_end


def accepts(grammar: Grammar, tokenizer: Any, text: str) -> bool:
    """Whether a text is complete under a grammar."""
    size = len(tokenizer)
    constraint, bits = grammar.start(), np.zeros((size + 31) // 32, np.int32)
    for token in tokenizer.encode(text, add_special_tokens=False):
        constraint.fill(bits)
        if not bits[token // 32] >> token % 32 & 1:
            return False
        constraint.advance(token)
    return constraint.fill(bits)


class TestRefusals:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (GrammarSpec(kind="json_schema", text="{"), ["can't be read as JSON"]),
            (GrammarSpec(kind="json_schema", text="[1]"), ["must be an object"]),
            (GrammarSpec.json_schema(False), ["must be an object", "nothing fits"]),
            (GrammarSpec.json_schema({"type": "foo"}), ["can't be compiled", "foo"]),
            (GrammarSpec.json_schema({"type": 3}), ["can't be compiled"]),
            (GrammarSpec.json_schema({"not": {"type": "string"}}), ["keywords that can't be enforced", '"not"']),
            (GrammarSpec.json_schema({"type": "array", "uniqueItems": True}), ["can't be enforced", '"uniqueItems"']),
            (GrammarSpec.json_schema({"$ref": "https://example.com/schema"}), ["https://example.com", "$defs"]),
            (GrammarSpec.json_schema({"properties": {"a": {"$ref": "other.json#/a"}}}), ["other.json", "$defs"]),
            (GrammarSpec.json_schema({"$ref": "#/$defs/missing"}), ["can't be compiled"]),
            (GrammarSpec.json_schema({"enum": []}), ["can't be compiled", "Unsatisfiable"]),
            (GrammarSpec.json_schema({"type": "string", "pattern": "(a"}), ["can't be compiled", "regex"]),
            (GrammarSpec.regex("(a"), ["can't be compiled", "regex"]),
            (GrammarSpec.regex("a(?=b)"), ["can't be compiled", "regex"]),
            (GrammarSpec.regex("\ud800"), ["can't be compiled"]),
            (
                GrammarSpec.json_schema({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}),
                ["oneOf", "use anyOf"],
            ),
            (GrammarSpec.json_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), ["no text"]),
            (GrammarSpec.json_schema({"const": "\ud800"}), ["can't be compiled"]),
            (GrammarSpec.lark("start: foo"), ["can't be compiled", "foo"]),
            (GrammarSpec.lark("start: @missing"), ["can't be compiled", "missing"]),
            (GrammarSpec.lark("nonsense"), ["can't be compiled"]),
        ],
        ids=lambda value: str(value)[:60] if isinstance(value, GrammarSpec) else "",
    )
    def test_what_cannot_be_compiled(self, compiler: GrammarCompiler, spec: GrammarSpec, words: list[str]) -> None:
        with pytest.raises(GrammarError) as raised:
            compiler.compile(spec)
        assert isinstance(raised.value, InvalidArgumentError)
        for word in words:
            assert word in str(raised.value)
        assert len(str(raised.value)) < 600

    def test_limits(self, demo: LanguageModel) -> None:
        limits = GrammarLimits(max_bytes=400, max_depth=5, max_keywords=20)
        small = GrammarCompiler(demo.text_tokenizer, limits)
        deep: dict[str, Any] = {"type": "integer"}
        for _ in range(3):
            deep = {"properties": {"a": deep}}
        wide = {"enum": list(range(30))}
        long = {"const": "x" * 500}
        for schema, words in (
            (deep, "deeper than 5 levels"),
            (wide, "more than 20 keywords"),
            (long, "bytes, and 400 are allowed"),
        ):
            with pytest.raises(GrammarError, match=words):
                small.compile(GrammarSpec.json_schema(schema))
            with pytest.raises(GrammarError, match=words):
                small.compile(GrammarSpec.lark("start: @a", {"a": schema}))
            GrammarCompiler(demo.text_tokenizer).compile(GrammarSpec.json_schema(schema))
        for spec in (GrammarSpec.regex("x" * 401), GrammarSpec.lark("start: " + "x" * 400)):
            with pytest.raises(GrammarError, match="400 are allowed"):
                small.compile(spec)

    def test_a_schema_deeper_than_pythons_stack(self, compiler: GrammarCompiler) -> None:
        text = '{"items":' * 3000 + "{}" + "}" * 3000
        with pytest.raises(GrammarError, match=r"deeper than 32 levels|recursion"):
            compiler.compile(GrammarSpec(kind="json_schema", text=text))

    @pytest.mark.parametrize(
        "limits", [{"max_bytes": 0}, {"max_depth": True}, {"max_keywords": -1}, {"seconds": 0}, {"seconds": "x"}]
    )
    def test_limits_that_nothing_could_keep(self, limits: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=next(iter(limits))):
            GrammarLimits(**limits)

    def test_values_are_not_taken_for_references(self, compiler: GrammarCompiler) -> None:
        compiler.compile(GrammarSpec.json_schema({"enum": [{"$ref": "http://x"}]}))
        compiler.compile(GrammarSpec.json_schema({"properties": {"$ref": {"type": "string"}}}))

    def test_names_of_schemas(self) -> None:
        with pytest.raises(GrammarError, match="'Not a name'"):
            GrammarSpec.lark("start: @a", {"Not a name": {}})

    def test_without_the_library(self, demo: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(GrammarError, match=r"pip install 'layerskip\[serve\]'"):
            GrammarCompiler(demo.text_tokenizer).compile(GrammarSpec.json_object())


class TestTokenizers:
    @pytest.mark.parametrize("kind", ["llama2", "mistral", "gemma", "byte level"])
    @pytest.mark.parametrize("ours", [True, False])
    def test_texts_are_accepted_token_by_token(self, kind: str, ours: bool) -> None:
        made = byte_level() if kind == "byte level" else byte_fallback(kind)
        tokenizer: Any = without_transformers(made) if ours else made
        grammar = GrammarCompiler(tokenizer).compile(GrammarSpec.json_schema(SCHEMAS["flat"]))
        assert accepts(grammar, tokenizer, '{"name": "the é日", "age": 12}') or kind in ("llama2", "mistral")
        tokens, may_end = allowed(grammar, [], len(tokenizer))
        names = tokenizer.convert_ids_to_tokens(sorted(tokens))
        assert "{" in names or "<0x7B>" in names
        assert not may_end
        assert not tokens & set(tokenizer.all_special_ids)

    @pytest.mark.parametrize("tokenizer", [word_piece(), unigram(), slow()], ids=["words", "unigram", "slow"])
    def test_those_without_bytes_are_refused(self, tokenizer: Any) -> None:
        with pytest.raises(GrammarError, match="structured output needs"):
            GrammarCompiler(tokenizer).compile(GrammarSpec.json_object())

    def test_the_tokenizer_stays_as_it_was(self, demo: LanguageModel) -> None:
        tokenizer = demo.text_tokenizer
        before = len(tokenizer)
        GrammarCompiler(tokenizer).prepare()
        assert len(tokenizer) == before

    def test_a_model_with_more_tokens_than_its_tokenizer(self, demo: LanguageModel, compiler: GrammarCompiler) -> None:
        grammar, size = compiler.compile(GrammarSpec.regex("[ab]*")), len(demo.text_tokenizer)
        few, many = allowed(grammar, [], size), allowed(grammar, [], size + 500)
        assert few == many
        assert few[1]
        assert all(token < size for token in few[0])

    def test_special_tokens_that_a_grammar_names(self, demo: LanguageModel) -> None:
        backend = Backend.from_str(demo.text_tokenizer.backend.to_str())  # type: ignore[attr-defined]
        tokenizer = TextTokenizer(
            backend, special_tokens={"eos_token": "<|endoftext|>"}, extra_special_tokens=["<|go|>"]
        )
        (go,) = tokenizer.convert_tokens_to_ids(["<|go|>"])
        grammar = GrammarCompiler(tokenizer).compile(GrammarSpec.lark('start: <|go|> "a"'))
        assert allowed(grammar, [], len(tokenizer)) == ({go}, False)


class TestKeeping:
    def test_the_same_specification_is_compiled_once(self, demo: LanguageModel) -> None:
        compiler = GrammarCompiler(demo.text_tokenizer)
        first = compiler.compile(GrammarSpec.json_schema(SCHEMAS["flat"]))
        assert compiler.compile(GrammarSpec.json_schema(json.loads(json.dumps(SCHEMAS["flat"])))) is first
        assert compiler.compile(GrammarSpec.json_schema(SCHEMAS["enum"])) is not first

    def test_the_least_recently_used_goes_first(self, demo: LanguageModel) -> None:
        compiler = GrammarCompiler(demo.text_tokenizer, most_kept=2)
        specs = [GrammarSpec.regex(pattern) for pattern in ("a", "b", "c")]
        first, second = compiler.compile(specs[0]), compiler.compile(specs[1])
        assert compiler.compile(specs[0]) is first
        compiler.compile(specs[2])
        assert compiler.compile(specs[0]) is first
        assert compiler.compile(specs[1]) is not second

    def test_many_threads(self, demo: LanguageModel) -> None:
        compiler = GrammarCompiler(demo.text_tokenizer)
        specs = [GrammarSpec.json_schema(schema) for schema in SCHEMAS.values()] * 8
        with ThreadPoolExecutor(8) as pool:
            grammars = list(pool.map(compiler.compile, specs))
        size = len(demo.text_tokenizer)
        starts = [allowed(grammar, [], size) for grammar in grammars]
        assert starts == starts[: len(SCHEMAS)] * 8
        compiler.close()

    def test_a_compilation_that_hangs_holds_up_others_no_longer_than_their_limit(
        self, demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from threading import Event

        gate = Event()
        compiler = GrammarCompiler(demo.text_tokenizer, GrammarLimits(seconds=0.2)).prepare()
        compile_ = compiler._compile
        monkeypatch.setattr(compiler, "_compile", lambda checked: (gate.wait(30), compile_(checked))[1])
        for pattern in ("a", "b", "c"):
            with pytest.raises(GrammarError, match="took longer"):
                compiler.compile(GrammarSpec.regex(pattern))
        gate.set()
        monkeypatch.undo()
        compiler.compile(GrammarSpec.regex("d"))
        assert compiler_module.THREADS == 2


class TestConstraint:
    def test_going_back_gives_the_same(self, demo: LanguageModel, compiler: GrammarCompiler) -> None:
        """After any number of tokens, taken back in any number."""
        tokenizer, grammar = demo.text_tokenizer, compiler.compile(GrammarSpec.json_schema(SCHEMAS["nested"]))
        tokens = tokenizer.encode('{"user": {"id": 17, "address": {"city": "Rome"}}}', add_special_tokens=False)
        size = len(tokenizer)
        constraint, bits = grammar.start(), np.zeros((size + 31) // 32, np.int32)
        seen = [(constraint.fill(bits), bits.copy())]
        for token in tokens:
            constraint.advance(token)
            seen.append((constraint.fill(bits), bits.copy()))
        assert seen[-1][0]
        for back in range(1, len(tokens) + 1):
            constraint.rollback(back)
            for place in range(len(tokens) - back, len(tokens) + 1):
                may_end = constraint.fill(bits)
                assert (may_end, bits.tolist()) == (seen[place][0], seen[place][1].tolist())
                if place < len(tokens):
                    constraint.advance(tokens[place])

    def test_after_an_error(self, demo: LanguageModel, compiler: GrammarCompiler) -> None:
        tokenizer, grammar = demo.text_tokenizer, compiler.compile(GrammarSpec.regex("abc"))
        a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
        constraint, bits = grammar.start(), np.zeros((len(tokenizer) + 31) // 32, np.int32)
        constraint.fill(bits)
        constraint.advance(a)
        constraint.fill(bits)
        before = bits.copy()
        with pytest.raises(ConstraintError):
            constraint.advance(a)
        assert not constraint.fill(bits)
        assert bits.tolist() == before.tolist()
        constraint.rollback(1)
        with pytest.raises(ConstraintError):
            constraint.advance(b)
        constraint.fill(bits)
        constraint.advance(a)

    def test_states_are_independent(self, demo: LanguageModel, compiler: GrammarCompiler) -> None:
        grammar, size = compiler.compile(GrammarSpec.regex("ab")), len(demo.text_tokenizer)
        (a,) = demo.text_tokenizer.encode("a", add_special_tokens=False)
        before = allowed(grammar, [], size)
        grammar.start().advance(a)
        assert allowed(grammar, [], size) == before
        assert allowed(grammar, [a], size) != before


def test_white_space_is_bounded(demo: LanguageModel, compiler: GrammarCompiler) -> None:
    grammar, tokenizer = compiler.compile(GrammarSpec.json_schema(SCHEMAS["array with bounds"])), demo.text_tokenizer
    for text, fits in [
        ("[1,2]", True),
        ("[1, 2]", True),
        ("[\n    1,\n    2\n]", True),
        ("[1,  2]", False),
        ("[1,\n\n2]", False),
        ("[" + "\n" + " " * 17 + "1,2]", False),
        (" [1,2]", False),
        ("[1,2] ", False),
    ]:
        assert accepts(grammar, tokenizer, text) == fits, text


def test_a_clients_own_white_space_does_not_count(demo: LanguageModel, compiler: GrammarCompiler) -> None:
    schema = {**SCHEMAS["array with bounds"], "x-guidance": {"whitespace_pattern": r"\s*"}}
    grammar = compiler.compile(GrammarSpec.json_schema(schema))
    assert not accepts(grammar, demo.text_tokenizer, "[1,     2]")
