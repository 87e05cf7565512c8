"""What is known of a model from one call to the next, by the number of rows that run."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from engines import drain
from policies import View, make_costs

from layerskip.decoding.adaptive.cost_cache import read_costs, write_costs
from layerskip.decoding.adaptive.costs import Costs, estimate_costs
from layerskip.decoding.adaptive.experience import FIRST_CALL_SECONDS, Experience, size_of
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.policy import DraftSource
from layerskip.decoding.request import make_request
from layerskip.language_model import LanguageModel
from layerskip.model.decoders.native import NativeDecoder
from layerskip.model.native.library import load_library

COSTS = {size: make_costs(num_layers=5, row=0.05 * size) for size in (1, 2, 4, 8, 16)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes that are looked up, as it happens; their costs are those of `COSTS`. Rows are padded."""
    monkeypatch.setattr(NativeDecoder, "ragged", False)
    sizes: list[int] = []

    def find(decoder: Any, num_rows: int) -> Costs:
        sizes.append(num_rows)
        return COSTS[num_rows]

    monkeypatch.setattr("layerskip.decoding.adaptive.experience.read_costs", find)
    return sizes


@pytest.fixture
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No costs were measured before."""
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    return tmp_path / "costs"


def test_unknown_costs_are_estimated_at_once_and_measured_bit_by_bit(
    text_lm: LanguageModel, nothing_known: Path
) -> None:
    experience, calls = Experience(text_lm.decoder), text_lm.decoder.layer_calls
    experience.recall(1)
    assert text_lm.decoder.layer_calls == calls
    times = experience.times(1, samples=False)
    assert times.costs == estimate_costs(text_lm.decoder)
    assert experience.look(1, 0.0) == 0.0
    assert experience.look(1, 0.99 * FIRST_CALL_SECONDS) == 0.0
    assert not times.costs.complete
    while experience.look(1, 100.0) > 0:
        pass
    assert times.costs.complete
    assert times is experience.times(1, samples=False)
    assert times.costs != estimate_costs(text_lm.decoder)
    assert len(list(nothing_known.iterdir())) == 1
    later = Experience(text_lm.decoder)
    later.recall(1)
    assert later.times(1, samples=True).costs == times.costs
    assert later.look(1, 100.0) == 0.0


def test_costs_are_used_before_all_are_measured_but_not_kept(text_lm: LanguageModel, nothing_known: Path) -> None:
    experience = Experience(text_lm.decoder)
    experience.recall(1)
    times = experience.times(1, samples=False)
    estimated = times.costs
    while times.costs == estimated:
        experience._unmeasured[1].latest = 0.0
        experience.look(1, 1e-9)  # one call
    assert not times.costs.complete
    later = Experience(text_lm.decoder)
    later.recall(1)
    assert later.times(1, samples=False).costs == estimated
    write_costs(text_lm.decoder, 1, times.costs)  # as an earlier version has
    later = Experience(text_lm.decoder)
    later.recall(1)
    assert later.times(1, samples=False).costs == estimated


def disturbed(costs: Costs) -> Costs:
    """As if the machine had done something else while a single token was timed."""
    return replace(costs, layer=(20 * costs.layer[0], *costs.layer[1:]), complete=True)


def test_costs_that_can_not_be_true_are_measured_again_and_not_kept(
    text_lm: LanguageModel, nothing_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = text_lm.decoder
    good = replace(estimate_costs(decoder), complete=True)
    assert good.is_plausible
    assert not disturbed(good).is_plausible
    results = [disturbed(good), good]
    attempts = []

    def measuring(*_: Any) -> Iterator[None]:
        attempts.append(len(attempts))
        yield None
        return results[min(len(attempts), len(results)) - 1]

    monkeypatch.setattr("layerskip.decoding.adaptive.experience.measuring", measuring)
    experience = Experience(decoder)
    experience.recall(1)
    experience.look(1, 10.0)
    assert attempts == [0, 1]
    assert experience.look(1, 10.0) == 0
    assert experience.times(1, samples=False).costs == good
    assert read_costs(decoder, 1) == good
    results[1] = disturbed(good)
    write_costs(decoder, 1, disturbed(good))
    again = Experience(decoder)
    again.recall(1)  # what an earlier process has kept is no better
    assert again.times(1, samples=False).costs == estimate_costs(decoder)
    again.look(1, 10.0)
    assert again.look(1, 10.0) == 0  # there is an end to it
    assert len(attempts) == 2 + 3


def test_the_first_call_measures_nothing_before_it_begins(text_lm: LanguageModel, nothing_known: Path) -> None:
    lm, entered = LanguageModel(text_lm.checkpoint, text_lm.decoder), list[tuple[int, ...]]()
    text_lm.decoder.calls.observer = lambda *entry: entered.append(entry)
    try:
        lm.generate([[5, 6, 7]], max_new_tokens=1)
    finally:
        text_lm.decoder.calls.observer = None
    assert len(entered) == 1
    assert not nothing_known.exists()


def test_exits_that_nobody_trained_are_not_tried_without_evidence(text_lm: LanguageModel) -> None:
    for trained, drafts in ((True, True), (False, False)):
        experience = Experience(text_lm.decoder, trained=trained, costs={1: make_costs(num_layers=4)})
        policy = experience.policy()
        policy.prepare(View())
        plan = policy.plan(View())
        assert (plan.source == "layers") == drafts


def test_sizes_are_powers_of_two() -> None:
    assert [size_of(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_sizes_share_costs_and_kinds_of_rows_share_nothing(text_lm: LanguageModel, measured: list[int]) -> None:
    experience = Experience(text_lm.decoder)
    for num_rows in (1, 3, 4, 2, 1):
        experience.recall(num_rows)
    assert measured == [1, 4, 2]
    assert experience.times(3, samples=False) is experience.times(4, samples=False)
    assert experience.times(3, samples=False).costs is COSTS[4]
    assert experience.times(4, samples=False) is not experience.times(4, samples=True)
    assert experience.pace(3, samples=False) is experience.pace(4, samples=False)
    assert experience.pace(4, samples=False) is not experience.pace(4, samples=True)
    assert experience.rates(samples=False) is experience.rates(samples=False)
    assert experience.rates(samples=False) is not experience.rates(samples=True)
    policies = [experience.policy(), experience.policy(exit_layer=2, most_drafts=3)]
    assert [policy.knowledge for policy in policies] == [experience] * 2
    assert (policies[1].exits, policies[1].most_drafts) == ((2,), 3)


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
def test_without_padding_costs_of_one_row_serve_for_all_sizes(text_lm: LanguageModel, nothing_known: Path) -> None:
    experience = Experience(text_lm.decoder)
    for num_rows in (16, 1, 4):
        experience.recall(num_rows)
    four, one = experience.times(4, samples=False), experience.times(1, samples=False)
    assert four.costs == estimate_costs(text_lm.decoder).for_rows(4)
    while experience.look(16, 100.0) > 0:
        pass
    assert one.costs.complete
    assert one.costs.ragged
    assert four.costs == one.costs.for_rows(4)
    assert experience.times(3, samples=True).costs == four.costs
    assert len(list(nothing_known.iterdir())) == 1


def test_a_size_that_was_not_measured_borrows_the_next_larger_ones_costs(
    text_lm: LanguageModel, measured: list[int]
) -> None:
    experience = Experience(text_lm.decoder, costs={2: COSTS[2], 8: COSTS[8]})
    found = {num_rows: experience.times(num_rows, samples=False).costs for num_rows in (1, 2, 3, 4, 6, 9)}
    assert found == {1: COSTS[2], 2: COSTS[2], 3: COSTS[8], 4: COSTS[8], 6: COSTS[8], 9: COSTS[8]}
    assert measured == []  # rows are running: measuring would take their time


def test_borrowed_costs_are_corrected_by_rounds_of_that_size_and_replaced_once_measured(
    text_lm: LanguageModel, measured: list[int]
) -> None:
    experience = Experience(text_lm.decoder, costs={8: COSTS[8]})
    borrowed, eight = experience.times(4, samples=False), experience.times(8, samples=False)
    for _ in range(9):
        borrowed.observe("none", 0, 0, 0.5 * COSTS[8].step())
    assert experience.times(4, samples=False).seconds("none") == pytest.approx(0.5 * COSTS[8].step())
    assert eight.correction("none") == 1.0
    experience.recall(3)
    assert measured == [4]
    assert experience.times(4, samples=False).costs is COSTS[4]
    assert experience.times(4, samples=False).correction("none") == 1.0
    assert experience.times(8, samples=False) is eight


def test_measuring_again_keeps_what_was_learned(text_lm: LanguageModel, measured: list[int]) -> None:
    experience = Experience(text_lm.decoder, costs={4: COSTS[4]})
    times = experience.times(4, samples=True)
    experience.recall(4)
    assert measured == []
    assert experience.times(3, samples=True) is times


@dataclass(kw_only=True)
class Noted(RoundTimes):
    """Also lists how many rows each round had that corrected it."""

    last_entry: ClassVar[int] = 0
    """Rows of the last entry into layers."""
    rows: list[int] = field(default_factory=list)

    def observe(self, source: DraftSource, exit_layer: int, num_drafts: float, seconds: float, **rest: Any) -> None:
        super().observe(source, exit_layer, num_drafts, seconds, **rest)
        self.rows.append(Noted.last_entry)


@pytest.fixture
def noted(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Corrections note the rows of their rounds."""

    def note(start: int, stop: int, num_rows: int, num_queries: int) -> None:
        Noted.last_entry = num_rows

    monkeypatch.setattr("layerskip.decoding.adaptive.experience.RoundTimes", Noted)
    text_lm.decoder.calls.observer = note
    yield
    text_lm.decoder.calls.observer = None


def run_eight(lm: LanguageModel, experience: Experience, lengths: list[int], **options: Any) -> None:
    """A batch of eight rows of these lengths."""
    engine = Engine(lm.decoder, max_rows=8, capacity=lm.decoder.max_context, experience=experience)
    for seed, length in enumerate(lengths):
        config = GenerationConfig(generation_strategy="adaptive", max_new_tokens=length, **options)
        engine.add(make_request(lm.decoder, [2 + seed, 5, 6], config, seed=seed))
    drain(engine)


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_rows_that_end_early_teach_the_next_batch_of_eight_nothing_wrong(
    text_lm: LanguageModel, options: dict[str, Any]
) -> None:
    """The times of eight rows are corrected by rounds of five to eight rows only, and so are those of fewer."""
    experience = Experience(text_lm.decoder, costs={8: COSTS[8]})
    run_eight(text_lm, experience, [4, 4, 4, 4, 4, 40, 60, 110], **options)
    found = {size: experience.times(size, samples=bool(options)) for size in (1, 2, 4, 8)}
    times = {size: each for size, each in found.items() if isinstance(each, Noted)}
    assert all(times[size].rows for size in (1, 2, 4)), "no rounds of few rows were timed"
    before = len(times[8].rows)
    run_eight(text_lm, experience, [60] * 8, **options)
    assert len(times[8].rows) > before
    for size, each in times.items():
        assert experience.times(size, samples=bool(options)) is each
        assert {size_of(count) for count in each.rows} == {size}, each.rows
