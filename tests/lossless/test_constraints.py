"""Drafts under constraints: the text is what decoding without drafts, cache or engine gives, token for token."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from constraints import Maze, decode_slowly
from engines import cache_of, drain, start
from policies import Erratic

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixBlocks
from layerskip.decoding.request import make_request
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

VOCAB, TOKENS = 48, 24
SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
RULES: list[dict[str, Any]] = [
    {},
    SAMPLED,
    {"do_sample": True, "top_p": 0.7, "seed": 1},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4, "logit_bias": {3: 4.0, 9: -3.0}},
]
WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    *({"exit_layer": exit_layer, "num_speculations": count} for exit_layer in range(1, 6) for count in (1, 4)),
    {"exit_layer": 3, "num_speculations": 8},
    {"generation_strategy": "ngram", "num_speculations": 4},
    {"generation_strategy": "adaptive"},
]


def run(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    mazes: Sequence[Maze | None],
    policy: Any = None,
    **options: Any,
) -> list[Row]:
    """Rows of one engine, each with a fresh constraint or none, when all have ended."""
    config = GenerationConfig(**{"max_new_tokens": TOKENS, **options})
    requests = [
        make_request(
            lm.decoder, prompt, config, seed=config.seed or 0, constraint=maze.fresh() if maze is not None else None
        )
        for prompt, maze in zip(prompts, mazes, strict=True)
    ]
    capacity = max(len(request.tokens) + request.max_new_tokens for request in requests)
    engine = Engine(lm.decoder, max_rows=len(requests), capacity=capacity, policy=policy, experience=lm._experience)
    rows = [engine.add(request) for request in requests]
    drain(engine)
    return rows


def outcome(row: Row) -> tuple[list[int], str]:
    assert row.finish_reason is not None
    return row.output, row.finish_reason


MAZES = [
    Maze(1, VOCAB),
    Maze(2, VOCAB, length=13, forced=0.7),
    Maze(3, VOCAB, ending=0.3, forced=0.2),
]


@pytest.fixture(scope="module")
def expected(lm: LanguageModel, prompts: list[list[int]]) -> Callable[..., list[tuple[list[int], str]]]:
    """What each prompt gives with its own maze."""
    known: dict[str, list[tuple[list[int], str]]] = {}

    def outcomes(**options: Any) -> list[tuple[list[int], str]]:
        key = repr(options)
        if key not in known:
            known[key] = [
                decode_slowly(lm, prompt, maze, **{"max_new_tokens": TOKENS, **options})
                for prompt, maze in zip(prompts, MAZES, strict=True)
            ]
        return known[key]

    return outcomes


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_texts_equal_decoding_without_drafts(
    lm: LanguageModel,
    prompts: list[list[int]],
    expected: Callable[..., Any],
    way: dict[str, Any],
    rules: dict[str, Any],
) -> None:
    """In a ragged batch and alone, with end tokens that may come now and then."""
    options = {"eos_token_ids": (5, 11), **rules}
    texts = expected(**options)
    assert [outcome(row) for row in run(lm, prompts, MAZES, **way, **options)] == texts
    for prompt, maze, text in zip(prompts, MAZES, texts, strict=True):
        assert outcome(run(lm, [prompt], [maze], **way, **options)[0]) == text


def test_the_mazes_reach_every_end(expected: Callable[..., Any]) -> None:
    """Without texts that end by themselves, by an end token and by length, equality would prove less."""
    texts = [text for rules in RULES for text in expected(eos_token_ids=(5, 11), **rules)]
    ended = [(reason, tokens[-1] in (5, 11)) for tokens, reason in texts]
    assert {("stop", True), ("stop", False), ("length", False)} <= set(ended)


@pytest.mark.parametrize("rules", [RULES[0], RULES[1]], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_plans_that_change_from_round_to_round(
    lm: LanguageModel, prompts: list[list[int]], expected: Callable[..., Any], rules: dict[str, Any], seed: int
) -> None:
    """Steps, drafts by layers and from the text, early stops and probes, in any order."""
    policy = Erratic(seed, lm.config.num_layers)
    rows = run(lm, prompts, MAZES, policy, generation_strategy="adaptive", eos_token_ids=(5, 11), **rules)
    assert [outcome(row) for row in rows] == expected(eos_token_ids=(5, 11), **rules)
    assert policy.seen


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[6], WAYS[-2], WAYS[-1]], ids=str)
def test_rows_with_and_without_constraints_share_rounds(
    lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any], rules: dict[str, Any]
) -> None:
    penalized = {**rules, "no_repeat_ngram_size": 3, "eos_token_ids": (5,)}
    free = run(lm, prompts, [None] * 3, **WAYS[0], **penalized)
    one, other = MAZES[1], MAZES[0]
    bound = [run(lm, [prompt], [maze], **WAYS[0], **penalized)[0] for prompt, maze in zip(prompts, MAZES, strict=True)]
    assert any(a.output != b.output for a, b in zip(free, bound, strict=True))
    mixed = run(lm, [*prompts, prompts[1], prompts[0]], [None, None, None, one, other], **way, **penalized)
    assert [outcome(row) for row in mixed[:3]] == [outcome(row) for row in free]
    assert outcome(mixed[3]) == outcome(bound[1])
    assert outcome(mixed[4]) == outcome(bound[0])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_never_more_tokens_than_asked_for(
    lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any], max_new_tokens: int
) -> None:
    maze = Maze(4, VOCAB, forced=0.8)
    row, *_ = run(lm, prompts[1:2], [maze], max_new_tokens=max_new_tokens, **way)
    assert outcome(row) == decode_slowly(lm, prompts[1], maze, max_new_tokens=max_new_tokens)
    assert len(row.output) == max_new_tokens


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_full_context(lm: LanguageModel, way: dict[str, Any]) -> None:
    prompt = [(7 * i) % VOCAB for i in range(lm.decoder.max_context - 9)]
    maze = Maze(6, VOCAB, forced=0.6)
    row, *_ = run(lm, [prompt], [maze], max_new_tokens=500, **way)
    assert outcome(row) == decode_slowly(lm, prompt, maze, max_new_tokens=9)


class TestForcedTokens:
    FORCED = (4, 8, 15, 16, 23, 42, 1, 3, 7, 9, 2, 6)

    @pytest.mark.parametrize("way", WAYS[1:], ids=str)
    def test_cost_no_rounds(self, lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any]) -> None:
        maze = Maze(0, VOCAB, forcing=self.FORCED, length=len(self.FORCED))
        row, *_ = run(lm, prompts[1:2], [maze], max_new_tokens=60, **way)
        assert outcome(row) == (list(self.FORCED), "stop")
        stats = row.recorder.finish(row.prompt_length, len(row.output))
        assert stats.rounds == 1
        assert stats.accepted == stats.drafted == len(self.FORCED) - 1  # the prompt gives the first one
        assert stats.accepted_by == stats.drafted_by == {"grammar": len(self.FORCED) - 1}

    def test_are_one_token_a_step_without_drafts(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        maze = Maze(0, VOCAB, forcing=self.FORCED, length=len(self.FORCED))
        row, *_ = run(lm, prompts[1:2], [maze], max_new_tokens=60, **WAYS[0])
        assert outcome(row) == (list(self.FORCED), "stop")
        assert row.recorder.rounds == len(self.FORCED) - 1

    def test_run_the_first_layers_together(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        """E layers for the pending and all forced tokens, E after the last draft, then the rest once."""
        if lm.decoder.kernels == "static":
            pytest.skip("counts are those of the network's own calls")
        maze = Maze(0, VOCAB, forcing=self.FORCED, forced=0.0)
        engine = start_one(lm, prompts[1], maze, max_new_tokens=20, exit_layer=2, num_speculations=1)
        engine.step()
        before = lm.decoder.layer_calls
        (event,) = engine.step()
        assert len(event.drafts) == len(self.FORCED)  # all but the first, and one that layers chose
        assert lm.decoder.layer_calls - before == 2 + 2 + (lm.decoder.num_layers - 2)

    def test_are_not_taken_for_good_drafts_of_the_layers(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        policy = Noting(exit_layer=1, num_speculations=3)
        run(lm, prompts[1:2], [Maze(8, VOCAB, forced=0.9)], policy, generation_strategy="adaptive")
        assert all(drafted <= 3 for _, drafted in policy.tried)
        assert sum(drafted for _, drafted in policy.tried) < policy.drafted


class Noting:
    """One plan for all rounds; notes what it could learn."""

    def __init__(self, **plan: Any) -> None:
        from layerskip.decoding.policy import Plan

        self._plan, self.tried, self.drafted = Plan(source="layers", **plan), list[tuple[int, int]](), 0

    def prepare(self, view: Any) -> None: ...

    def plan(self, view: Any) -> Any:
        return self._plan

    def observe(self, plan: Any, result: Any) -> None:
        self.tried.append(result.tried(0))
        self.drafted += len(result.drafts[0])


def start_one(lm: LanguageModel, prompt: list[int], maze: Maze, **options: Any) -> Engine:
    config = GenerationConfig(**options)
    request = make_request(lm.decoder, prompt, config, seed=0, constraint=maze.fresh())
    engine = Engine(lm.decoder, max_rows=1, capacity=len(prompt) + request.max_new_tokens)
    engine.add(request)
    return engine


class TestEnds:
    @pytest.mark.parametrize("way", WAYS, ids=str)
    def test_a_complete_text_ends_without_an_end_token(
        self, lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any]
    ) -> None:
        for length in (1, 2, 5, 9):
            row, *_ = run(lm, prompts[:1], [Maze(5, VOCAB, length=length)], **way)
            assert (len(row.output), row.finish_reason, row.stop_reason) == (length, "stop", None)

    @pytest.mark.parametrize("way", WAYS, ids=str)
    def test_an_end_token_comes_only_where_the_text_may_end(
        self, lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any]
    ) -> None:
        ends = tuple(range(0, VOCAB, 2))  # half of all tokens would end the text
        maze = Maze(9, VOCAB, ending=0.15, forced=0.0)
        for seed in range(4):
            options = {"eos_token_ids": ends, "temperature": 1.5, "seed": seed}
            row, *_ = run(lm, prompts[:1], [maze], **way, **options)
            assert outcome(row) == decode_slowly(lm, prompts[0], maze, max_new_tokens=TOKENS, **options)

    def test_ignored_end_tokens_are_tokens_like_others(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        maze = Maze(9, VOCAB, ending=0.5)
        for way in WAYS:
            row, *_ = run(lm, prompts[:1], [maze], eos_token_ids=(1, 2, 3), ignore_eos=True, **way)
            assert outcome(row) == decode_slowly(lm, prompts[0], maze, max_new_tokens=TOKENS)


class TestErrors:
    @pytest.mark.parametrize("way", WAYS, ids=str)
    @pytest.mark.parametrize("fails", [0, 1, 6])
    def test_end_their_own_row_only(
        self, lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any], fails: int
    ) -> None:
        options = {"repetition_penalty": 1.1}
        broken = Maze(1, VOCAB, fails=fails)
        rows = run(lm, [prompts[0], prompts[1], prompts[1]], [MAZES[0], broken, None], **way, **options)
        assert rows[1].finish_reason == "error"
        assert "nothing can be said" in str(rows[1].stop_reason)
        others = run(lm, prompts[:2], [MAZES[0], None], **WAYS[0], **options)
        assert [outcome(row) for row in (rows[0], rows[2])] == [outcome(row) for row in others]
        whole = decode_slowly(lm, prompts[1], Maze(1, VOCAB), max_new_tokens=TOKENS, **options)[0]
        assert rows[1].output == whole[:fails]

    def test_where_other_rules_forbid_what_the_grammar_wants(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        """A token that must come may not come twice."""
        maze = Maze(0, VOCAB, forcing=(7, 7, 7, 7))
        for way in WAYS:
            row, *_ = run(lm, [[1, 2]], [maze], no_repeat_ngram_size=1, **way)
            assert (row.output, row.finish_reason) == ([7], "error")
            assert "none has a finite score" in str(row.stop_reason)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("kind", ["all", "some"])
@pytest.mark.parametrize("rules", RULES[:2], ids=str)
def test_drafts_by_adapters(
    lm_folder: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    kind: str,
    kernels: str,
    rules: dict[str, Any],
) -> None:
    """Also by heads that have none of the allowed tokens; and every token has its adapter's keys afterwards."""
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    tokens = range(0, VOCAB, 3) if kind == "some" else None
    adapters = write_tiny_adapters(tmp_path / "adapters", lm_folder, (1, 3), tokens=tokens)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kernels": kernels}
    lm = layerskip.load(str(lm_folder), exit_adapters=adapters, **options)
    texts = [
        decode_slowly(lm, prompt, maze, max_new_tokens=TOKENS, **rules)
        for prompt, maze in zip(prompts, MAZES, strict=True)
    ]
    for way in WAYS:
        assert [outcome(row) for row in run(lm, prompts, MAZES, **way, **rules)] == texts, way
    for seed in range(3):
        policy = Erratic(seed, lm.config.num_layers)
        rows = run(lm, prompts, MAZES, policy, generation_strategy="adaptive", **rules)
        assert [outcome(row) for row in rows] == texts
    for way in WAYS[1:]:
        engine = start_one(lm, prompts[1], Maze(1, VOCAB), max_new_tokens=20, **way)
        cache, row, length = cache_of(engine), engine.rows[0], len(prompts[1]) + 19
        drain(engine)
        read = start(lm.decoder, [row.tokens[:-1]], max_new_tokens=1, generation_strategy="autoregressive")
        whole = cache_of(read)
        drain(read)
        torch.testing.assert_close(cache.keys[:, 0, :length], whole.keys[:, 0, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("point", range(0, 9, 2))
def test_rows_that_join_and_leave(lm: LanguageModel, prompts: list[list[int]], point: int) -> None:
    """Guides stay with their rows when rows move."""
    pick = random.Random(point)
    alone = [run(lm, [prompt], [maze], exit_layer=2)[0] for prompt, maze in zip(prompts, MAZES, strict=True)]
    config = GenerationConfig(max_new_tokens=TOKENS, exit_layer=2)
    engine = Engine(lm.decoder, max_rows=3, capacity=64, prefill_chunk=4)
    order = pick.sample(range(3), 3)
    rows: dict[int, Row] = {}
    for number in order:
        maze = MAZES[number].fresh()
        rows[number] = engine.add(make_request(lm.decoder, prompts[number], config, seed=0, constraint=maze))
        for _ in range(pick.randrange(4)):
            engine.step()
    for _ in range(point):
        engine.step()
    victim = rows[order[0]]
    if victim.finish_reason is None:
        engine.finish(victim, "interrupted")
    drain(engine)
    for number, row in rows.items():
        text = alone[number].output
        assert row.output == (text[: len(row.output)] if row is victim else text)


@pytest.mark.parametrize("rules", RULES[:2], ids=str)
@pytest.mark.parametrize("way", [WAYS[4], WAYS[-2], WAYS[-1]], ids=str)
def test_an_engine_that_serves_many(lm: LanguageModel, way: dict[str, Any], rules: dict[str, Any]) -> None:
    """Prompts come again, with and without constraints: prefixes in blocks, and drafts from texts of others."""
    pick = random.Random(3)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6] * 3, [3, 1, 4, 1, 5, 9, 2, 6] * 2 + [7], [20, 21, 22]]
    kinds: list[Maze | None] = [None, *MAZES]
    cases = [(prompt, maze) for prompt in range(3) for maze in range(4)]
    options = {"max_new_tokens": 16, "eos_token_ids": (5, 11), "logprobs": 0, **rules}
    plain = {(p, m): outcome(run(lm, [prompts[p]], [kinds[m]], **WAYS[0], **options)[0]) for p, m in cases}
    config = GenerationConfig(**way, **options)
    engine = Engine(
        lm.decoder,
        max_rows=3,
        capacity=lm.decoder.max_context,
        experience=lm._experience,
        prefix_blocks=PrefixBlocks(max_bytes=1 << 20, block_tokens=4),
        shares_suffixes=True,
        prefill_chunk=8,
    )
    waiting, rows = pick.sample(cases * 4, len(cases) * 4), list[tuple[tuple[int, int], Row]]()
    while waiting or engine.rows:
        while waiting and engine.free_rows:
            prompt, kind = case = waiting.pop()
            maze = kinds[kind]
            constraint = maze.fresh() if maze is not None else None
            request = make_request(lm.decoder, prompts[prompt], config, seed=config.seed or 0, constraint=constraint)
            rows.append((case, engine.add(request)))
        engine.step()
    assert len(rows) == 48
    assert sum(row.recorder.cached_tokens for _, row in rows) > 100
    for case, row in rows:
        assert outcome(row) == plain[case], case
