"""Sampling, early stops, adapters and costs in CUDA graphs. Skipped where there is no CUDA device."""

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from engines import drain, start
from policies import Ragged
from tiny import write_agreeing

from layerskip.decoding.adaptive.costs import measure_costs
from layerskip.language_model import LanguageModel
from layerskip.model.choosing.sampling import choose_tokens, filter_in_torch
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, StopRule
from layerskip.model.draw import Draw
from layerskip.model.graphs.choosing import choose, confidences, filtered, noise_after
from layerskip.model.graphs.program import Recorder
from layerskip.model.graphs.rows import RowInputs, RowTensors, draws_of

pytestmark = pytest.mark.gpu

Load = Callable[..., LanguageModel]
LAYERS, EXITS = 5, (1, 3)
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13], *([i, 5, i + 3] * (i % 3 + 1) for i in range(1, 6))]
RULES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.9, "seed": 5},
    {"do_sample": True, "temperature": 0.8, "top_k": 7, "seed": 6},
    {"do_sample": True, "top_p": 0.9, "min_p": 0.02, "seed": 7},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers whose exits agree now and then."""
    found = tmp_path_factory.mktemp("agreeing")
    write_agreeing(found)
    return found


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two that read values of later layers."""
    return write_tiny_adapters(tmp_path_factory.mktemp("adapters"), folder, EXITS, tokens=range(0, 48, 2))


@pytest.fixture(params=["bare", "adapted"])
def pair(
    request: pytest.FixtureRequest, load_here: Load, folder: Path, adapters: Path
) -> tuple[LanguageModel, LanguageModel]:
    """With graphs and without."""
    found = adapters if request.param == "adapted" else None
    graphs = load_here(folder, dtype="float32", exit_adapters=found)
    assert isinstance(graphs.decoder, GraphDecoder)
    return graphs, load_here(folder, dtype="float32", compile="off", exit_adapters=found)


def captured(lm: LanguageModel) -> set[tuple[str, str]]:
    assert isinstance(lm.decoder, GraphDecoder)
    assert [made.problem for made in lm.decoder.compiled if made.problem] == []
    return {(made.shape.kind, made.shape.draws) for made in lm.decoder.compiled}


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rounds_write_the_same_text(pair: tuple[LanguageModel, LanguageModel], rules: dict[str, Any]) -> None:
    """Twice, so that graphs serve texts that did not make them."""
    graphs, calls = pair
    options = {"max_new_tokens": 40, "ignore_eos": True, **rules}
    for prompts in (PROMPTS, PROMPTS[1:2]):
        expected = [x.token_ids for x in calls.generate(prompts, generation_strategy="autoregressive", **options)]
        for way in (
            {"generation_strategy": "autoregressive"},
            {"exit_layer": 1, "num_speculations": 4},
            {"exit_layer": 3, "num_speculations": 8},
            {"generation_strategy": "ngram"},
            {"generation_strategy": "adaptive"},
        ):
            for _ in range(2):
                assert [x.token_ids for x in graphs.generate(prompts, **way, **options)] == expected, way
    sorts = "top_k" in rules or "top_p" in rules
    draws = "filters" if sorts else "noise" if rules["do_sample"] else "no"
    assert ("round", draws) in captured(graphs)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_drafts_that_stop_early_write_the_same_text(
    pair: tuple[LanguageModel, LanguageModel], rules: dict[str, Any]
) -> None:
    graphs, calls = pair
    options = {"max_new_tokens": 80, "ignore_eos": True, **rules}
    seeds = list(range(len(PROMPTS)))
    plain = start(calls.decoder, PROMPTS, seeds=seeds, generation_strategy="autoregressive", **options)
    wanted = list(plain.rows)
    drain(plain)
    for seed in range(3):  # the later ones find more rounds captured
        stopping = start(graphs.decoder, PROMPTS, seeds=seeds, policy=Ragged(seed, (2, 3)), **options)
        found = list(stopping.rows)
        drain(stopping)
        assert [row.tokens for row in found] == [row.tokens for row in wanted]
        del stopping
        gc.collect()  # its buffers, and with them its graphs, serve the next
    assert {"draft", "last", "pass"} <= {kind for kind, _ in captured(graphs)}


def test_drafts_counts_and_confidences_are_those_of_calls(pair: tuple[LanguageModel, LanguageModel]) -> None:
    decoders, pick = [lm.decoder for lm in pair], random.Random(0)
    caches = [decoder.new_cache(2, 60) for decoder in decoders]
    shortened = 0
    for seed in range(30):
        rates = tuple(pick.uniform(0.3, 1.0) for _ in range(CONFIDENCE_CLASSES))
        stop = StopRule(rates=rates, least=pick.uniform(0, 0.5), kept=pick.choice([0.0, 0.3]))
        draw = Draw(temperatures=(0.8, 0.0), top_k=(9, 0), top_p=(0.9, 1.0), min_p=(0.0, 0.0), seeds=(seed, 0))
        request = DraftRequest(exit_layer=pick.choice([1, 3]), num_drafts=6, lengths=(6, 3), stop=stop, draw=draw)
        with torch.inference_mode():
            ours, theirs = (
                decoder.round([5, 6], cache, request, LAYERS) for decoder, cache in zip(decoders, caches, strict=True)
            )
        assert [list(row) for row in ours.drafts] == [list(row) for row in theirs.drafts]
        for found, wanted in zip(ours.confidences, theirs.confidences, strict=True):
            assert list(found) == pytest.approx(list(wanted), rel=1e-3, abs=1e-5)
        shortened += [len(row) for row in ours.drafts] != [6, 3]
    assert shortened > 3
    assert {"draft", "last", "pass"} <= {kind for kind, _ in captured(pair[0])}


@pytest.mark.parametrize("size", [96, 50_001])
def test_choices_are_those_of_calls_to_the_last_bit(device: str, size: int) -> None:
    """On the device itself, where torch divides and sorts in its own ways; and from a graph, on a GPU."""
    here = torch.device(device)
    logits = (4 * torch.randn(4, 3, size, generator=torch.Generator().manual_seed(0))).to(here)
    kinds = [
        {"temperatures": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperatures": 1.3, "top_k": 40, "top_p": 1.0, "min_p": 0.0},
        {"temperatures": 0.9, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"temperatures": 0.8, "top_k": 64, "top_p": 0.95, "min_p": 0.01},
    ]
    first, inputs = [3, 60, 700, 100_000], RowInputs(4, here)
    for rules in kinds:
        settings: dict[str, Any] = {name: (value,) * 4 for name, value in rules.items()}
        draw = Draw(**settings, seeds=(0, 1, 2**40, 2**63 - 1))
        inputs.fill([0] * 4, first, 200_000, draw=draw)
        draws = draws_of(draw)

        def call(draws: Any = draws) -> torch.Tensor:
            rows = RowTensors.of(inputs.tensor)
            scores = filtered(logits, rows, draws)
            tokens = choose(scores, rows, noise_after(rows, 0, 3, size))
            return torch.cat((tokens.double(), confidences(scores, tokens).double()), 1)

        scores = filter_in_torch(draw, logits)
        assert torch.equal(filtered(logits, RowTensors.of(inputs.tensor), draws), scores), rules
        expected = choose_tokens(logits, draw, [position + 1 for position in first])
        if device != "cpu":  # there, the ordinary noise is that of the compiled kernels
            assert torch.equal(call()[:, :3].long(), expected), rules
        chosen = scores.softmax(-1).gather(-1, expected.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(call()[:, 3:].float(), chosen)
        if here.type == "cuda":
            graph, found = Recorder(here).record(call)
            graph.replay()
            assert torch.equal(found, call())


@pytest.mark.parametrize("num_rows", [1, 4])
def test_costs_are_measured_with_graphs(pair: tuple[LanguageModel, LanguageModel], num_rows: int) -> None:
    graphs = pair[0].decoder
    assert isinstance(graphs, GraphDecoder)
    costs = measure_costs(graphs, num_rows)
    captured(pair[0])
    made = {(each.shape.kind, each.shape.num_drafts + 1) for each in graphs.compiled}
    assert made >= {("pass", n) for n in (1, 2, 3, 5, 9)}
    if not graphs.adapted_exits:  # of so few layers, no two bare exits are left to compare
        assert made >= {("draft", 16), ("last", 16)}
    assert costs.step() > 0
    assert costs.complete
