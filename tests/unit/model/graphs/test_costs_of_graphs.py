"""Costs of a network whose rounds are captured: those of replays, never of what runs before or while capturing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip.decoding.adaptive.call_timer import CallTimer
from layerskip.decoding.adaptive.cost_cache import read_costs, write_costs
from layerskip.decoding.adaptive.costs import estimate_costs, measure_costs
from layerskip.decoding.adaptive.experience import Experience
from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import DraftRequest
from layerskip.model.stopwatch import Stopwatch

UNCAPTURED = 1000.0
"""Seconds that are told of calls that captured nothing yet, or captured something."""


@pytest.fixture
def slow_at_first(load_decoder: Callable[..., GraphDecoder], monkeypatch: pytest.MonkeyPatch) -> GraphDecoder:
    """A network whose clock says how calls ran."""
    decoder = load_decoder(uses_before=2)
    since, seen = Stopwatch.since, [0]

    def tell(watch: Stopwatch, started: float) -> float:
        provisional, seen[0] = decoder.provisional_rounds > seen[0], decoder.provisional_rounds
        return UNCAPTURED if provisional else since(watch, started)

    monkeypatch.setattr(Stopwatch, "since", tell)
    return decoder


@pytest.mark.parametrize("num_rows", [1, 2])
def test_only_replays_are_timed(slow_at_first: GraphDecoder, num_rows: int) -> None:
    decoder = slow_at_first
    costs = measure_costs(decoder, num_rows, queries=(1, 2, 3, 5))
    parts = [*costs.layer, *costs.fixed, costs.draft_layer, costs.draft_head, costs.draft_fixed, costs.asking]
    assert max(parts) < 1
    assert costs.step() > 0
    made = {
        (each.shape.kind, each.shape.exit_layer, each.shape.num_drafts + 1, each.shape.asks)
        for each in decoder.compiled
    }
    assert made >= {("pass", start, n, False) for start in (0, 3) for n in (1, 2, 3, 5)}
    assert made >= {("draft", 1, 16, False), ("draft", 1, 16, True), ("last", 1, 16, False)}
    assert {each.shape.num_rows for each in decoder.compiled} == {num_rows}


def test_a_timer_waits_for_what_it_times(slow_at_first: GraphDecoder) -> None:
    timer = CallTimer(slow_at_first, 1, 5)
    assert timer.seconds(0, 4, 3) < 1
    assert timer.drafting(2, 3) < 1
    assert slow_at_first.provisional_rounds == 3 + 3 + 1  # a pass, drafts, and the one that completes them


def test_what_is_timed_is_what_rounds_run(load_decoder: Callable[..., GraphDecoder]) -> None:
    """A round that stops early uses the graphs that were timed."""
    decoder = load_decoder()
    timer = CallTimer(decoder, 1, 5)
    timer.drafting(2, 3)
    timer.seconds(2, 4, 4)
    made = len(decoder.compiled)
    decoder.round([5], timer._cache, DraftRequest(exit_layer=2, num_drafts=3, planned=9), 4)
    assert len(decoder.compiled) == made


def test_costs_are_kept_apart(
    tiny_checkpoint: Callable[..., Path],
    load_static: Callable[..., LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    folder = tiny_checkpoint()
    graphs, calls = load_static(folder).decoder, layerskip.load(str(folder), device="cpu", kernels="torch").decoder
    assert isinstance(graphs, GraphDecoder)
    assert (graphs.round_kind, calls.round_kind) == ("graphs", "calls")
    costs = measure_costs(calls, 1)
    assert costs.asking == 0.0
    write_costs(calls, 1, costs)
    assert read_costs(graphs, 1) is None
    write_costs(graphs, 1, estimate_costs(graphs))
    assert read_costs(calls, 1) == costs
    graphs._rounds.failed = True  # from now on, it runs by calls
    assert read_costs(graphs, 1) == costs


def test_adaptive_decoding_may_stop_early_in_graphs(
    load_decoder: Callable[..., GraphDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder()
    assert estimate_costs(decoder).asking > 0
    monkeypatch.setattr(decoder, "device", torch.device("cuda"))
    assert Experience(decoder).policy().stops_early
    decoder._rounds.failed = True
    assert not Experience(decoder).policy().stops_early


def test_drafts_are_timed_without_asking_and_with_it(load_decoder: Callable[..., GraphDecoder]) -> None:
    decoder, asked = load_decoder(), list[bool]()
    timer = CallTimer(decoder, 1, 5)
    draft = decoder.draft

    def note(tokens: Any, cache: Any, request: DraftRequest) -> Any:
        asked.append(request.stop is not None)
        return draft(tokens, cache, request)

    decoder.draft = note  # type: ignore[method-assign]
    timer.drafting(1, 3)
    assert not any(asked)
    measure_costs(decoder, 1, queries=(1, 2, 3))
    assert any(asked)
