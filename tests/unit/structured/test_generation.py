"""Text under grammars: it parses and fits its schema, and drafts change nothing of it."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import pytest
from schemas import SCHEMAS

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.output.events import GenerationResult
from layerskip.language_model import LanguageModel
from layerskip.structured.compiler import GrammarCompiler
from layerskip.structured.grammar import Grammar
from layerskip.structured.spec import GrammarSpec

PROMPT = "Here is the record in JSON:\n"
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    {"temperature": 1.5, "seed": 2},
    {"temperature": 0.9, "seed": 3, "acceptance": "rejection"},
]
WAYS: list[dict[str, Any]] = [
    {"exit_layer": 2, "num_speculations": 4},
    {"exit_layer": 1, "num_speculations": 7},
    {"generation_strategy": "ngram"},
    {"generation_strategy": "adaptive"},
]
PLAIN: dict[str, Any] = {"generation_strategy": "autoregressive"}
MODELS = ["demo", "random_lm"]


def write(
    lm: LanguageModel, grammars: Sequence[Grammar | None], tokens: int = 160, **options: Any
) -> list[GenerationResult]:
    """What a model writes after `PROMPT`, once under each grammar, in one batch."""
    config = GenerationConfig(max_new_tokens=tokens, **options)
    (prompt,) = lm.encode(PROMPT)
    requests = [
        lm.request(
            prompt, config, seed=(config.seed or 0) + i, constraint=grammar.start() if grammar is not None else None
        )
        for i, grammar in enumerate(grammars)
    ]
    return lm.start(requests).run()


@pytest.fixture(scope="module")
def compilers(request: pytest.FixtureRequest) -> Callable[[str], tuple[LanguageModel, GrammarCompiler]]:
    known: dict[str, tuple[LanguageModel, GrammarCompiler]] = {}

    def get(name: str) -> tuple[LanguageModel, GrammarCompiler]:
        if name not in known:
            lm: LanguageModel = request.getfixturevalue(name)
            known[name] = lm, GrammarCompiler(lm.text_tokenizer)
        return known[name]

    return get


def check(schema: Any, result: GenerationResult) -> bool:
    """Whether a text is complete; if it is, it must fit."""
    assert result.finish_reason in ("stop", "length"), result
    if result.finish_reason == "length":
        return False
    jsonschema.validate(json.loads(result.text), schema, format_checker=jsonschema.FormatChecker())
    return True


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_all_schemas_at_once(
    compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]], model: str, rules: dict[str, Any]
) -> None:
    """Ten schemas in one ragged batch, however they are drafted; most texts are complete."""
    lm, compiler = compilers(model)
    grammars = [compiler.compile(GrammarSpec.json_schema(schema)) for schema in SCHEMAS.values()]
    expected = write(lm, grammars, **PLAIN, **rules)
    complete = sum(check(schema, result) for schema, result in zip(SCHEMAS.values(), expected, strict=True))
    assert complete >= 6
    for way in WAYS:
        results = write(lm, grammars, **way, **rules)
        for schema, result in zip(SCHEMAS.values(), results, strict=True):
            check(schema, result)
        if rules.get("acceptance") != "rejection":
            assert [result.token_ids for result in results] == [result.token_ids for result in expected], way
            assert [result.finish_reason for result in results] == [result.finish_reason for result in expected]
        assert sum(result.stats.accepted_by.get("grammar", 0) for result in results) > 50


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES[:2], ids=str)
def test_a_trained_model_with_exit_adapters(
    compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]], rules: dict[str, Any]
) -> None:
    lm, compiler = compilers("smollm2")
    exit_layer = lm.decoder.adapted_exits[0]
    grammars = [compiler.compile(GrammarSpec.json_schema(schema)) for schema in SCHEMAS.values()]
    ways: list[dict[str, Any]] = [PLAIN, {"exit_layer": exit_layer, "num_speculations": 4}, {}]
    written = [write(lm, grammars, 100, **way, **rules) for way in ways]
    for results in written:
        complete = sum(check(schema, result) for schema, result in zip(SCHEMAS.values(), results, strict=True))
        assert complete >= 8
    for results in written[1:]:
        assert [result.token_ids for result in results] == [result.token_ids for result in written[0]]


@pytest.mark.parametrize("way", [PLAIN, *WAYS], ids=str)
def test_with_rows_that_are_free(
    compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]], way: dict[str, Any]
) -> None:
    lm, compiler = compilers("demo")
    grammar = compiler.compile(GrammarSpec.json_schema(SCHEMAS["nested"]))
    options = {"repetition_penalty": 1.05, **way}
    mixed = write(lm, [grammar, None, grammar], 60, **options)
    assert mixed[1].token_ids == write(lm, [None], 60, **options)[0].token_ids
    assert mixed[0].token_ids == write(lm, [grammar], 60, **PLAIN, repetition_penalty=1.05)[0].token_ids
    check(SCHEMAS["nested"], mixed[0])


@pytest.mark.parametrize("model", MODELS)
def test_any_object(compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]], model: str) -> None:
    lm, compiler = compilers(model)
    grammar = compiler.compile(GrammarSpec.json_object())
    complete = 0
    for seed in range(6):
        (result,) = write(lm, [grammar], 200, temperature=1.0, seed=seed, exit_layer=2)
        complete += check({"type": "object"}, result)
        assert not re.search(r"\s{18}", re.sub(r'"(\\.|[^"\\])*"', '""', result.text))
    assert complete or model == "demo"


@pytest.mark.parametrize("pattern", [r"[a-z]{3}-\d{4}", r"(yes|no)!", r"x{20}y*z"])
def test_regular_expressions(compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]], pattern: str) -> None:
    lm, compiler = compilers("random_lm")
    grammar = compiler.compile(GrammarSpec.regex(pattern))
    for seed in range(4):
        options = {"temperature": 1.2, "seed": seed}
        (result,) = write(lm, [grammar], **options, exit_layer=2, num_speculations=5)
        assert result.token_ids == write(lm, [grammar], **options, **PLAIN)[0].token_ids
        assert result.finish_reason == "length" or re.fullmatch(pattern, result.text)


def test_a_grammar_of_tool_calls(compilers: Callable[[str], tuple[LanguageModel, GrammarCompiler]]) -> None:
    lm, compiler = compilers("random_lm")
    grammar = compiler.compile(
        GrammarSpec.lark(
            """start: call+
call: "<call>{\\"name\\": " ( add | mul ) "}</call>"
add: "\\"add\\", \\"arguments\\": " @add
mul: "\\"mul\\", \\"arguments\\": " @mul
""",
            {"add": SCHEMAS["array with bounds"], "mul": SCHEMAS["enum"]},
        )
    )
    seen = set()
    for seed in range(8):
        (result,) = write(lm, [grammar], 120, temperature=1.0, seed=seed, exit_layer=3, stop="</call>")
        assert result.finish_reason == "stop"
        call = json.loads(result.text.removeprefix("<call>"))
        jsonschema.validate(call["arguments"], SCHEMAS["array with bounds" if call["name"] == "add" else "enum"])
        seen.add(call["name"])
    assert seen == {"add", "mul"}


class TestEnds:
    def test_any_end_token_of_the_request_may_end_the_text(self, random_lm: LanguageModel) -> None:
        """Where the grammar would let it go on, too, and nowhere else; also one that is text otherwise."""
        grammar = GrammarCompiler(random_lm.text_tokenizer).compile(GrammarSpec.regex("[a-z]{4,}"))
        (x,) = random_lm.text_tokenizer.convert_tokens_to_ids(["x"])
        ends = (0, x)
        reasons = set()
        for seed in range(12):
            options = {"temperature": 2.0, "seed": seed, "eos_token_ids": ends, "logit_bias": {0: 6.0, x: 6.0}}
            (result,) = write(random_lm, [grammar], 40, exit_layer=2, **options)
            assert result.token_ids == write(random_lm, [grammar], 40, **PLAIN, **options)[0].token_ids
            text = random_lm.text_tokenizer.decode(
                [token for token in result.token_ids if token not in ends], clean_up_tokenization_spaces=False
            )
            assert re.fullmatch("[a-z]{4,}", str(text))
            assert not set(result.token_ids[:-1]) & set(ends)
            reasons.add(result.stop_reason)
        assert reasons >= set(ends)

    def test_a_text_that_is_complete_ends_without_one(self, random_lm: LanguageModel) -> None:
        grammar = GrammarCompiler(random_lm.text_tokenizer).compile(GrammarSpec.regex("abc"))
        for way in (PLAIN, *WAYS):
            (result,) = write(random_lm, [grammar], **way)
            assert (result.text, result.finish_reason, result.stop_reason) == ("abc", "stop", None)

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
    def test_no_more_tokens_than_asked_for(self, random_lm: LanguageModel, max_new_tokens: int) -> None:
        grammar = GrammarCompiler(random_lm.text_tokenizer).compile(GrammarSpec.json_object())
        for way in (PLAIN, *WAYS):
            (result,) = write(random_lm, [grammar], max_new_tokens, **way)
            assert len(result.token_ids) <= max_new_tokens
