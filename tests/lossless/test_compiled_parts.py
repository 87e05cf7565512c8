"""Rounds as CUDA graphs hold them, whole and in parts, with sampling, early stops and adapters: the same tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, StopRule
from layerskip.model.draw import Draw

LAYERS = 5
EXITS = (1, 3)
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13], *([i, 5, i + 3] * (i % 3 + 1) for i in range(1, 6))]
"""Eight, of lengths from 1 to 9."""
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.8, "top_k": 7, "seed": 6},
    {"top_p": 0.9, "min_p": 0.02, "do_sample": True, "seed": 2**63 - 1},
]


@pytest.fixture(scope="module")
def adapters(lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two, which read values of later layers; their heads have every second token."""
    folder = tmp_path_factory.mktemp("adapters")
    return write_tiny_adapters(folder, lm_folder, EXITS, tokens=range(0, 48, 2))


@pytest.fixture(scope="module", params=["bare", "adapted"])
def pair(
    request: pytest.FixtureRequest, lm_folder: Path, adapters: Path, load_static: Callable[..., LanguageModel]
) -> tuple[LanguageModel, LanguageModel]:
    """One network as graphs hold it, and operator by operator, with or without adapters."""
    found = adapters if request.param == "adapted" else None
    plain = layerskip.load(str(lm_folder), dtype="float32", device="cpu", kernels="torch", exit_adapters=found)
    return load_static(lm_folder, exit_adapters=found), plain


def texts(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [result.token_ids for result in lm.generate(prompts, **options)]


def kinds_of(lm: LanguageModel) -> set[tuple[str, str]]:
    assert isinstance(lm.decoder, GraphDecoder)
    assert all(made.problem is None for made in lm.decoder.compiled)
    return {(made.shape.kind, made.shape.draws) for made in lm.decoder.compiled}


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_exit_length_and_batch(pair: tuple[LanguageModel, LanguageModel], rules: dict[str, Any]) -> None:
    static, plain = pair
    options = {"max_new_tokens": 18, **rules}
    expected = texts(plain, PROMPTS, generation_strategy="autoregressive", **options)
    assert texts(static, PROMPTS, generation_strategy="autoregressive", **options) == expected
    accepted = 0
    for exit_layer in range(1, LAYERS + 1):
        for num_speculations in (1, 4, 8):
            way = {"exit_layer": exit_layer, "num_speculations": num_speculations, **options}
            results = static.generate(PROMPTS, **way)
            assert [result.token_ids for result in results] == expected, way
            accepted += sum(result.stats.accepted for result in results)
            assert texts(static, PROMPTS[1:2], **way) == expected[1:2], way
    assert accepted > 100
    draws = "no" if not rules else "filters" if "top_k" in rules or "top_p" in rules else "noise"
    assert {("round", draws), ("pass", draws)} <= kinds_of(static)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_ends_within_drafts_and_full_caches(pair: tuple[LanguageModel, LanguageModel], rules: dict[str, Any]) -> None:
    static, plain = pair
    context = static.decoder.max_context
    prompts = [[(5 * i) % 48 for i in range(context - room)] for room in (1, 2, 6, 23)]
    expected = texts(plain, prompts, generation_strategy="autoregressive", max_new_tokens=100, **rules)
    assert [len(text) for text in expected] == [1, 2, 6, 23]
    eos = expected[3][9]
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in expected]
    for exit_layer, num_speculations in [(1, 4), (3, 8), (5, 4)]:
        way = {"exit_layer": exit_layer, "num_speculations": num_speculations, "max_new_tokens": 100, **rules}
        assert texts(static, prompts, **way) == expected, way
        assert texts(static, prompts, eos_token_ids=(eos,), **way) == cut, way
        assert texts(static, prompts[2:3], **{**way, "max_new_tokens": 1}) == [expected[2][:1]]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_other_strategies(pair: tuple[LanguageModel, LanguageModel], rules: dict[str, Any]) -> None:
    """Drafts from the text, adaptive decoding with its early stops, and early exit without drafts."""
    static, plain = pair
    options = {"max_new_tokens": 40, **rules}
    prompts = [[3, 1, 4, 1, 5, 9] * 3, [7, 8, 9] * 4]
    expected = texts(plain, prompts, generation_strategy="autoregressive", **options)
    for strategy in ("ngram", "adaptive"):
        assert texts(static, prompts, generation_strategy=strategy, **options) == expected
    for exit_layer in (2, 3):
        early = {"generation_strategy": "early_exit", "exit_layer": exit_layer, **options}
        assert texts(static, prompts, **early) == texts(plain, prompts, **early)


def copies(decoders: tuple[Decoder, Decoder], prompts: list[list[int]]) -> list[KVCache]:
    """A cache of each decoder that has read the prompts but for their last tokens."""
    caches = [decoder.new_cache(len(prompts), 40) for decoder in decoders]
    for row, prompt in enumerate(prompts):
        for decoder, cache in zip(decoders, caches, strict=True):
            if len(prompt) > 1:
                part = cache.view(row, row + 1)
                positions = decoder.place(part, [0], len(prompt) - 1)
                decoder.run_layers(decoder.embed(torch.tensor([prompt[:-1]])), positions, part, 0, LAYERS)
            cache.commit(row, len(prompt) - 1)
    return caches


def random_request(pick: random.Random, num_rows: int, exit_layer: int) -> DraftRequest:
    lengths = tuple(pick.choice([0, pick.randint(0, 6), 6]) for _ in range(num_rows))
    draw = None
    if pick.random() < 0.7:
        draw = Draw(
            temperatures=tuple(pick.choice([0.0, 0.7, 1.3]) for _ in range(num_rows)),
            top_k=tuple(pick.choice([0, 0, 5]) for _ in range(num_rows)),
            top_p=tuple(pick.choice([1.0, 0.8]) for _ in range(num_rows)),
            min_p=tuple(pick.choice([0.0, 0.05]) for _ in range(num_rows)),
            seeds=tuple(pick.getrandbits(64) for _ in range(num_rows)),
        )
    rates = tuple(pick.uniform(0.3, 1.0) for _ in range(CONFIDENCE_CLASSES))
    stop = StopRule(rates=rates, least=pick.uniform(0.0, 0.5), kept=pick.choice([0.0, 0.2, 0.5]))
    return DraftRequest(
        exit_layer=exit_layer,
        num_drafts=max(1, *lengths),
        lengths=lengths if any(lengths) else (1,) * num_rows,
        draw=draw,
        stop=pick.choice([stop, stop, None]),
    )


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_drafts_that_stop_early_are_those_of_separate_calls(
    pair: tuple[LanguageModel, LanguageModel], num_rows: int
) -> None:
    """Written drafts, their numbers and confidences, targets, and layers run; whatever stops which row, and when."""
    decoders, pick, stopped, given_up = (pair[0].decoder, pair[1].decoder), random.Random(num_rows), 0, 0
    caches = copies(decoders, PROMPTS[:num_rows])
    last = [prompt[-1] for prompt in PROMPTS[:num_rows]]
    with torch.inference_mode():
        for _ in range(40):
            request = random_request(pick, num_rows, pick.randint(1, LAYERS))
            before = [decoder.layer_calls for decoder in decoders]
            ours, theirs = (
                decoder.round(last, cache, request, LAYERS) for decoder, cache in zip(decoders, caches, strict=True)
            )
            if request.stop is None and request.num_drafts:  # a whole round drafts as many for all rows
                assert [row[:n] for row, n in zip(ours.drafts, request.lengths, strict=True)] == [
                    list(row[:n]) for row, n in zip(theirs.drafts, request.lengths, strict=True)
                ]
                continue
            assert [list(row) for row in ours.drafts] == [list(row) for row in theirs.drafts]
            assert [row[: len(drafts) + 1] for row, drafts in zip(ours.targets, ours.drafts, strict=True)] == [
                list(row[: len(drafts) + 1]) for row, drafts in zip(theirs.targets, theirs.drafts, strict=True)
            ]
            assert [len(row) for row in ours.confidences] == [len(row) for row in theirs.confidences]
            for found, wanted in zip(ours.confidences, theirs.confidences, strict=True):
                assert found == pytest.approx(list(wanted), rel=1e-4, abs=1e-6)
            assert len({decoder.layer_calls - calls for decoder, calls in zip(decoders, before, strict=True)}) == 1
            stopped += any(len(row) < n for row, n in zip(ours.drafts, request.lengths, strict=True))
            given_up += any(len(c) > len(d) for c, d in zip(ours.confidences, ours.drafts, strict=True))
    assert stopped > 3
    assert given_up > 1
    assert {kind for kind, _ in kinds_of(pair[0])} == {"round", "draft", "last", "pass"}


def test_one_graph_serves_all_seeds_settings_and_lengths(pair: tuple[LanguageModel, LanguageModel]) -> None:
    decoder = pair[0].decoder
    assert isinstance(decoder, GraphDecoder)
    cache = decoder.new_cache(1, 40)
    stop = StopRule(rates=(1.0,) * CONFIDENCE_CLASSES, least=0.0)
    for kind, stops in (("round", None), ("draft", stop)):
        made = len(decoder.compiled)
        for seed, (temperature, top_k, top_p) in enumerate([(0.5, 3, 1.0), (1.5, 0, 0.7), (0.9, 9, 0.5)]):
            draw = Draw(temperatures=(temperature,), top_k=(top_k,), top_p=(top_p,), min_p=(0.0,), seeds=(seed,))
            length = 2 if stops is None else 2 + seed
            decoder.round([5], cache, DraftRequest(exit_layer=4, num_drafts=length, draw=draw, stop=stops), LAYERS)
        assert [each.shape.kind for each in decoder.compiled[made:]].count(kind) == 1
