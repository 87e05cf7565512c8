"""Prefixes in blocks: a request that begins with keys and values of others writes what it writes alone."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from engines import cache_of, drain, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import BlockPool, PrefixBlocks
from layerskip.decoding.prefix.chains import NOBODY
from layerskip.decoding.request import make_request
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

SIZE = 4
"""Tokens of a block."""
EXITS = (1, 3)
WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    {"generation_strategy": "early_exit", "exit_layer": 2},
    {"generation_strategy": "early_exit", "exit_layer": 3},
    {"generation_strategy": "ngram", "num_speculations": 3},
    {"exit_layer": 1, "num_speculations": 2},
    {"exit_layer": 3, "num_speculations": 5},
    {"generation_strategy": "adaptive", "acceptance": "coupled"},
]
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 9},
    {"repetition_penalty": 1.2},
    {"temperature": 0.9, "acceptance": "rejection"},
]
BEGINNINGS = [[], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [3, 1, 4, 1, 5, 9, 2, 7], [7] * 21]


def make_engine(lm: LanguageModel, num_blocks: int = 60, *, collide: bool = False, **options: Any) -> Engine:
    cache = lm.decoder.new_cache(1, SIZE)
    block_bytes = 2 * cache.keys[:, 0, :SIZE].numel() * cache.keys.itemsize
    engine = Engine(
        lm.decoder,
        max_rows=options.pop("max_rows", 3),
        capacity=lm.decoder.max_context,
        prefix_blocks=PrefixBlocks(max_bytes=num_blocks * block_bytes, block_tokens=SIZE),
        experience=lm._experience,
        **options,
    )
    assert blocks_of(engine).num_blocks == num_blocks
    if collide:
        blocks_of(engine)._chains._hash = lambda parent, tokens: 0
        blocks_of(engine)._chains._root = 0
    return engine


def blocks_of(engine: Engine) -> BlockPool:
    blocks = engine._slots.blocks
    assert blocks is not None
    return blocks


def add(engine: Engine, prompt: Sequence[int], **options: Any) -> Row:
    config = GenerationConfig(**{"max_new_tokens": 12, "seed": 3, **options})
    return engine.add(make_request(engine.decoder, prompt, config, seed=config.seed or 0))


def alone(lm: LanguageModel, prompt: Sequence[int], **options: Any) -> list[int]:
    return lm.generate([list(prompt)], **{"max_new_tokens": 12, "seed": 3, **options})[0].token_ids


def check_blocks(engine: Engine) -> int:
    """Every block holds what reading its tokens gives: in compiled code to the last bit. Returns their number."""
    pool, decoder = blocks_of(engine), engine.decoder
    for number, block in pool._chains._blocks.items():
        tokens, parent = list(block.tokens), block.parent
        while parent != NOBODY:
            tokens[:0] = pool._chains._blocks[parent].tokens
            parent = pool._chains._blocks[parent].parent
        read = start(decoder, [[*tokens, 0]], max_new_tokens=1, generation_strategy="autoregressive")
        whole = cache_of(read)
        drain(read)
        for ours, theirs in zip(pool._parts, whole.buffers, strict=True):
            expected = theirs[:, 0, len(tokens) - SIZE : len(tokens)]
            if decoder.kernels == "native":
                assert torch.equal(ours[number], expected)
            else:
                torch.testing.assert_close(ours[number], expected, rtol=1e-4, atol=1e-5)
    return len(pool._chains)


@pytest.fixture(scope="module", params=["native", "torch", "static"])
def plain(make_lm: Callable[..., LanguageModel], request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return make_lm(kernels=request.param)


@pytest.fixture(scope="module")
def adapted(plain: LanguageModel, load_static: Callable[..., LanguageModel], tmp_path_factory: Any) -> LanguageModel:
    """The same network with exit adapters."""
    folder = plain.checkpoint.hugging_face_folder
    assert folder is not None
    adapters = write_tiny_adapters(tmp_path_factory.mktemp("adapters") / "all", folder, EXITS)
    options: dict[str, Any] = {"exit_adapters": adapters}
    if "Graph" in type(plain.decoder).__name__:
        return load_static(folder, **options)
    return layerskip.load(str(folder), dtype="float32", device="cpu", kernels=plain.decoder.kernels, **options)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("network", ["plain", "adapted"])
def test_the_text_is_the_same_with_and_without(
    plain: LanguageModel, adapted: LanguageModel, network: str, way: dict[str, Any], rules: dict[str, Any]
) -> None:
    """Each prompt twice, alone and beside others; the second one isn't read, as far as blocks go."""
    if rules.get("acceptance") == "rejection" and way.get("generation_strategy") in ("adaptive", "early_exit"):
        pytest.skip("the plans of adaptive decoding depend on measured times, and nothing is drafted at an early exit")
    lm = {"plain": plain, "adapted": adapted}[network]
    prompts = [[*beginning, *end] for beginning in BEGINNINGS for end in ([2], [11, 12, 13, 14, 15])]
    expected = [alone(lm, prompt, **way, **rules) for prompt in prompts]
    depth = way["exit_layer"] if way.get("generation_strategy") == "early_exit" else lm.decoder.num_layers
    engine, hits = make_engine(lm), 0
    for beside in (False, True):
        for prompt, text in zip(prompts, expected, strict=True):
            row = add(engine, prompt, **way, **rules)
            if beside:
                add(engine, [1, 2, 3], **way)
            drain(engine)
            assert row.output == text, prompt
            if beside and depth == lm.decoder.num_layers:
                assert row.recorder.cached_tokens == (len(prompt) - 1) // SIZE * SIZE
            hits += row.recorder.cached_tokens
    assert (hits > 0) == (depth == lm.decoder.num_layers)  # rows with fewer layers keep nothing
    check_blocks(engine)


@pytest.mark.parametrize("exit_layer", EXITS)
def test_early_exit_may_begin_with_keys_of_all_layers(adapted: LanguageModel, exit_layer: int) -> None:
    engine = make_engine(adapted)
    way = {"generation_strategy": "early_exit", "exit_layer": exit_layer}
    prompt = [*BEGINNINGS[1], 5, 6]
    add(engine, prompt)
    drain(engine)
    row = add(engine, prompt, **way)
    drain(engine)
    assert row.recorder.cached_tokens == 12
    assert row.output == alone(adapted, prompt, **way)
    check_blocks(engine)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[list[int], dict[str, Any], int, int | None]]:
    """Prompts that begin alike, their rules, the step before which they come, and the one after which they leave."""
    arrivals = []
    for _ in range(draw(st.integers(2, 8))):
        beginning = draw(st.sampled_from(BEGINNINGS))
        end = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
        options = {**draw(st.sampled_from(WAYS)), **draw(st.sampled_from(RULES[:4]))}
        options["max_new_tokens"] = draw(st.integers(1, 16))
        leaves = draw(st.one_of(st.none(), st.integers(0, 6)))
        arrivals.append(([*beginning, *end], options, draw(st.integers(0, 8)), leaves))
    return arrivals


@pytest.mark.parametrize("network", ["plain", "adapted"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_whoever_comes_and_goes(
    plain: LanguageModel, adapted: LanguageModel, network: str, data: st.DataObject
) -> None:
    """Rows leave while their prompts are read and between rounds, blocks are thrown out, hashes collide."""
    lm = {"plain": plain, "adapted": adapted}[network]
    engine = make_engine(
        lm,
        data.draw(st.sampled_from([1, 5, 12, 60])),
        collide=data.draw(st.booleans()),
        max_rows=data.draw(st.integers(1, 4)),
        prefill_chunk=data.draw(st.sampled_from([3, 8, 1024])),
        paces_reading=data.draw(st.booleans()),
    )
    waiting = sorted(data.draw(schedules()), key=lambda arrival: arrival[2])
    rows: list[tuple[Row, list[int], dict[str, Any], int | None]] = []
    for step in range(1000):
        while waiting and waiting[0][2] <= step and engine.free_rows:
            prompt, options, _, leaves = waiting.pop(0)
            rows.append((add(engine, prompt, **options), prompt, options, None if leaves is None else step + leaves))
        for row, *_, leaves in rows:
            if row.finish_reason is None and leaves is not None and leaves <= step:
                engine.finish(row, "interrupted")
        if not engine.rows and not waiting:
            break
        engine.step()
    for row, prompt, options, _ in rows:
        text = alone(lm, prompt, **options)
        assert row.output == (text[: len(row.output)] if row.finish_reason == "interrupted" else text)
    assert engine.free_rows == engine._slots.cache.num_rows
    check_blocks(engine)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_turns_of_a_conversation_are_read_once(adapted: LanguageModel, rules: dict[str, Any]) -> None:
    """Its own outputs are in blocks, too, whatever drafted them."""
    engine, text = make_engine(adapted), [9, 8, 7, 6, 5]
    for turn, way in enumerate(WAYS[3:6] * 2):
        row = add(engine, text, max_new_tokens=9, **way, **rules)
        drain(engine)
        assert row.output == alone(adapted, text, max_new_tokens=9, **way, **rules)
        assert row.recorder.cached_tokens == (0 if turn == 0 else (len(text) - 4) // SIZE * SIZE)
        text = [*row.tokens, 30 + turn, 31, 32]
    check_blocks(engine)


@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("paces_reading", [False, True])
def test_no_token_that_is_not_verified_is_kept(adapted: LanguageModel, steps: int, paces_reading: bool) -> None:
    """A row leaves while its prompt is read, or between rounds that draft."""
    engine = make_engine(adapted, paces_reading=paces_reading, prefill_chunk=6)
    prompt = [*BEGINNINGS[3], 2, 4]
    row = add(engine, prompt, exit_layer=3, num_speculations=5)
    for _ in range(steps):
        engine.step()
    engine.finish(row, "interrupted")
    known = min(6 * steps, len(prompt)) if not row.output else len(row.tokens) - 1
    assert check_blocks(engine) == known // SIZE
    again = add(engine, prompt)
    drain(engine)
    assert again.output == alone(adapted, prompt)
    assert again.recorder.cached_tokens == min(known, len(prompt) - 1) // SIZE * SIZE


def test_a_text_that_was_cut_keeps_what_remains(plain: LanguageModel) -> None:
    engine = make_engine(plain, lease_seconds=0.0)  # a step of several rounds would have written all of it
    row = add(engine, BEGINNINGS[1], exit_layer=2)
    while len(row.output) < 8:
        engine.step()
    engine.finish(row, "stop", "x", length=5)  # its last token had no keys yet
    assert check_blocks(engine) == (12 + 4) // SIZE


def test_prompts_that_begin_alike_share_what_the_first_has_read(plain: LanguageModel) -> None:
    """Though all of them came before anything was read."""
    engine = make_engine(plain, paces_reading=True, prefill_chunk=24)
    prompts = [[*BEGINNINGS[3], 30 + i] for i in range(3)]
    rows = [add(engine, prompt) for prompt in prompts]
    drain(engine)
    assert [row.recorder.cached_tokens for row in rows] == [0, 20, 20]
    assert [row.output for row in rows] == [alone(plain, prompt) for prompt in prompts]
    assert (engine.prefix_counts.queries, engine.prefix_counts.hits) == (66, 40)
    assert engine.prefix_counts.usage == len(blocks_of(engine)._chains) / 60


def test_a_prompt_that_waits_finds_more(plain: LanguageModel) -> None:
    """It has found its first two blocks, and while it waits, another request reads the same prompt to its end."""
    engine = make_engine(plain, paces_reading=True, prefill_chunk=24)
    add(engine, BEGINNINGS[1][:9])
    drain(engine)
    prompt = [*BEGINNINGS[1], *range(20, 30)]
    rows = [add(engine, prompt) for _ in range(2)]
    drain(engine)
    assert [row.recorder.cached_tokens for row in rows] == [8, 20]
    assert [row.output for row in rows] == [alone(plain, prompt)] * 2


def test_a_request_may_read_its_whole_prompt(plain: LanguageModel) -> None:
    engine = make_engine(plain)
    prompt = BEGINNINGS[3]
    add(engine, prompt)
    drain(engine)
    queries = engine.prefix_counts.queries
    config = GenerationConfig(max_new_tokens=12)
    request = make_request(plain.decoder, prompt, config, seed=3)
    fields = {name: getattr(request, name) for name in ("tokens", "config", "seed", "max_new_tokens")}
    row = engine.add(type(request)(**fields, prompt_logprobs=0))
    drain(engine)
    assert (row.recorder.cached_tokens, engine.prefix_counts.queries) == (0, queries)
    assert row.output == alone(plain, prompt)


@pytest.mark.parametrize("num_blocks", [1, 2, 7])
@pytest.mark.parametrize("collide", [False, True])
def test_a_full_pool_throws_out_and_stays_right(plain: LanguageModel, num_blocks: int, collide: bool) -> None:
    engine, pick, hits = make_engine(plain, num_blocks, collide=collide, max_rows=2), random.Random(num_blocks), 0
    for _ in range(12):
        pairs = []
        for _ in range(2):
            prompt = [*pick.choice(BEGINNINGS), *(pick.randrange(2) for _ in range(pick.randrange(1, 12)))]
            pairs.append((add(engine, prompt, exit_layer=2, max_new_tokens=6), prompt))
        drain(engine)
        for row, prompt in pairs:
            assert row.output == alone(plain, prompt, max_new_tokens=6)
            hits += row.recorder.cached_tokens
    assert engine.prefix_counts.usage == 1.0
    assert hits > 0
    assert check_blocks(engine) == num_blocks


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "smollm3", "qwen3_moe"])
def test_families(tiny_checkpoint: Callable[..., Path], family: str, kernels: str) -> None:
    """Windows of 8 tokens that end within prefixes, layers without rotation, norms of heads, experts."""
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    lm = layerskip.load(str(tiny_checkpoint(family)), dtype="float32", device="cpu", kernels=kernels)
    engine = make_engine(lm, prefill_chunk=7)
    for beginning in BEGINNINGS * 2:
        prompt = [*beginning, 40, 41]
        for way in ({"exit_layer": 2}, {"exit_layer": 1, "temperature": 0.9}):
            row = add(engine, prompt, ignore_eos=True, **way)
            drain(engine)
            assert row.output == alone(lm, prompt, ignore_eos=True, **way)
    assert engine.prefix_counts.hits > 100
    check_blocks(engine)
