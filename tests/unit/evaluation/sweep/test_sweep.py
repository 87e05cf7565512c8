"""Sweeps: predictions from replayed rounds, measurements, files, and what an interruption leaves."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, PromptError
from layerskip.evaluation.data.datasets import Example
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.prediction import (
    MOST_TRIED_SETTINGS,
    RoundTime,
    TimedRun,
    fit_round_time,
    predict,
    settings_to_try,
    timed_run,
)
from layerskip.evaluation.sweep.run import TOP, make_grid, sweep
from layerskip.evaluation.sweep.trajectories import Trajectory, replay
from layerskip.evaluation.sweep.worker import SweepWork
from layerskip.language_model import LanguageModel

CONFIG = GenerationConfig(max_new_tokens=24, do_sample=False)
EXAMPLES = [Example(index=i, prompt=text, reference=None) for i, text in enumerate(["abc", "the cab, ab", "é"])]
GRID = [Setting(exit_layer, length) for exit_layer in (1, 2, 3) for length in (1, 3)]


def work(lm: LanguageModel, config: GenerationConfig = CONFIG) -> SweepWork:
    return SweepWork(load=lambda: lm, exits=(1, 2, 3), config=config)


def make_trajectory(bits: str, *, max_new_tokens: int | None = None) -> Trajectory:
    return Trajectory(
        prompt_tokens=10,
        token_ids=tuple(range(len(bits))),
        max_new_tokens=len(bits) if max_new_tokens is None else max_new_tokens,
        prompt_seconds=1.0,
        seconds=1.0 + 2.0 * (len(bits) - 1),
        agreement={2: tuple(bit == "1" for bit in bits)},
    )


def test_rounds_of_a_text() -> None:
    found = replay(make_trajectory("0110111111"), Setting(2, 3))
    # after the first token: two hold and the third doesn't; then three hold; then the last two but the target's own
    assert found.rounds == Counter({3: 2, 1: 1})
    assert (found.drafted, found.accepted) == (7, 6)
    ended = replay(make_trajectory("01111", max_new_tokens=100), Setting(2, 8))  # the text ends inside the draft
    assert ended.rounds == Counter({8: 1})
    assert (ended.drafted, ended.accepted) == (8, 4)


COSTS = Costs(
    num_layers=4, layer=(0.25, 0.3, 0.35, 0.4), fixed=(0.5,) * 4, draft_layer=0.25, draft_head=0.25, draft_fixed=0.1
)


def test_predicted_speed_is_what_the_rounds_take() -> None:
    trajectory = make_trajectory("0110111111")
    (row,) = predict([trajectory], [Setting(2, 3)], COSTS, RoundTime(factor=1.5, around=0.25))
    calls = 2 * COSTS.round(2, 3) + COSTS.round(2, 1)
    assert row.predicted_tokens_per_second == pytest.approx(10 / (1.0 + 1.5 * calls + 3 * 0.25))
    assert row.acceptance_rate == pytest.approx(6 / 7)
    assert timed_run(trajectory, Setting(2, 3), COSTS, 5.0) == TimedRun(calls=calls, rounds=3, seconds=5.0)


@pytest.mark.parametrize(("factor", "around"), [(1.5, 0.25), (1.0, 0.0), (0.0, 2.0)])
def test_round_times_are_found_again(factor: float, around: float) -> None:
    sizes = [(1.0, 4), (8.0, 5), (3.0, 9)]
    runs = [TimedRun(calls=calls, rounds=n, seconds=factor * calls + around * n) for calls, n in sizes]
    found = fit_round_time(runs)
    assert (found.factor, found.around) == pytest.approx((factor, around), abs=1e-9)


def test_round_times_that_cannot_be_told_apart() -> None:
    same = [TimedRun(calls=2.0 * n, rounds=n, seconds=3.0 * n) for n in (1, 4)]  # all rounds cost the same
    found = fit_round_time(same)
    assert 2.0 * found.factor + found.around == pytest.approx(3.0)
    falling = [TimedRun(calls=1.0, rounds=1, seconds=4.0), TimedRun(calls=4.0, rounds=1, seconds=3.0)]
    assert min(fit_round_time(falling).factor, fit_round_time(falling).around) >= 0  # dearer calls, less time: noise
    assert fit_round_time([]) == RoundTime(factor=1.0, around=0.0)  # no text has a round


def test_what_is_tried() -> None:
    grid = [Setting(2, length) for length in range(1, 4)]
    assert settings_to_try([make_trajectory("0110111111")], grid, COSTS)[:2] == [(2, 1), (2, 3)]
    assert settings_to_try([make_trajectory("01")], [Setting(2, 1)], COSTS) == [(2, 1)]


def test_grids() -> None:
    assert make_grid([2, 1], [3, 1], 4) == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for exits, lengths, message in (
        ([], [1], "empty"),
        ([4], [1], "use 1 to 3"),
        ([0], [1], "layer 0"),
        ([1], [0], "got 0"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            make_grid(exits, lengths, 4)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_predictions_and_measurements(text_lm: LanguageModel, tmp_path: Path, exhaustive: bool) -> None:
    told: list[tuple[int, int | None]] = []

    def count(what: str, done: int, total: int | None) -> None:
        told.append((done, total))

    run = RunFolder(tmp_path, "sweep", {})
    report = sweep(work(text_lm), EXAMPLES, GRID, run, exhaustive=exhaustive, on_progress=count)
    measured = [row for row in report.rows if row.tokens_per_second is not None]
    assert len(report.rows) == len(GRID)
    assert len(measured) == (len(GRID) if exhaustive else TOP)
    finals = {key for key in run.samples if key.startswith("final/")}
    if exhaustive:  # the best of the grid, and decoding without drafts, were run once more
        best_rows = sorted(measured, key=lambda row: row.tokens_per_second or 0, reverse=True)[:TOP]
        settings = [(0, 0), *(row.setting for row in best_rows)]
        assert finals == {f"final/{e.index}/{setting[0]}/{setting[1]}" for e in EXAMPLES for setting in settings}
        assert report.best.setting in settings[1:]
        seconds = sum(run.samples[f"final/{e.index}/{report.best.exit_layer}/{report.best.num_speculations}"]["seconds"]
                      for e in EXAMPLES)  # fmt: skip
        assert report.best.total_time == pytest.approx(seconds)
    else:
        assert not finals
        assert report.best.tokens_per_second == max(row.tokens_per_second or 0 for row in measured)
    units = len(EXAMPLES) * (2 + len(measured) + MOST_TRIED_SETTINGS + exhaustive * (1 + TOP))
    assert told[-1] == (units, units)
    assert told == [(done, units) for done in sorted(done for done, _ in told)]
    assert 0 <= min(report.agreement.values()) <= max(report.agreement.values()) <= 1
    for row in measured:  # replayed acceptance is the real one
        setting = {"exit_layer": row.exit_layer, "num_speculations": row.num_speculations}
        results = text_lm.generate([str(example.prompt) for example in EXAMPLES], CONFIG, **setting)
        drafted, accepted = (sum(getattr(r.stats, name) for r in results) for name in ("drafted", "accepted"))
        assert row.acceptance_rate == pytest.approx(accepted / drafted)
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(int(row["exit_layer"]), int(row["num_speculations"])) for row in table] == GRID
    assert sum(row["total_time"] != "" for row in table) == len(measured)
    assert all(float(row["predicted_tokens_per_second"]) > 0 for row in table)


def test_an_interrupted_sweep_goes_on(text_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    generate = LanguageModel.generate

    def count(self: LanguageModel, prompts: Any, config: Any = None, **options: Any) -> Any:
        calls.append(options)
        return generate(self, prompts, config, **options)

    monkeypatch.setattr(LanguageModel, "generate", count)
    trials = 0

    def stop_after_two_trials(what: str, done: int, total: int | None) -> None:
        nonlocal trials
        trials += what == "trying rounds"
        if trials == 3:  # the first call tells of those that an earlier run finished
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(
            work(text_lm),
            EXAMPLES,
            GRID,
            RunFolder(tmp_path, "sweep", {}),
            exhaustive=True,
            on_progress=stop_after_two_trials,
        )
    run = RunFolder(tmp_path, "sweep", {})
    before = dict(run.samples)
    assert [key.split("/")[0] for key in before] == ["text"] * 3 + ["costs"] + ["trial"] * 2
    calls.clear()
    report = sweep(work(text_lm), EXAMPLES, GRID, run, exhaustive=True)
    assert {key: run.samples[key] for key in before} == before
    added = [key.split("/") for key in run.samples if key not in before]
    warm_ups = {(kind, *setting) for kind, _, *setting in added}  # the first of each setting, whenever work starts
    assert len(calls) == len(added) + len(warm_ups)
    calls.clear()
    again = sweep(work(text_lm), EXAMPLES, GRID, RunFolder(tmp_path, "sweep", {}), exhaustive=True)
    assert not calls
    assert [row.tokens_per_second for row in again.rows] == [row.tokens_per_second for row in report.rows]


def test_sampled_texts_cannot_be_replayed(text_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="decodes greedily"):
        sweep(work(text_lm, GenerationConfig(temperature=0.5)), EXAMPLES, GRID, RunFolder(tmp_path, "sweep", {}))


def test_texts_that_end_at_once(text_lm: LanguageModel, tmp_path: Path) -> None:
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_ids=tuple(range(text_lm.config.vocab_size)))
    with pytest.raises(PromptError, match=r"every text ends with its first token.*ignore_eos"):
        sweep(work(text_lm, config), EXAMPLES, GRID, RunFolder(tmp_path, "sweep", {}))


def test_the_table_grows_with_every_prompt(text_lm: LanguageModel, tmp_path: Path) -> None:
    """In whatever order prompts come back: `sweep.csv` has the times of those that are done."""
    times: list[float] = []

    def backwards(items: Any, make_worker: Any) -> Any:
        worker = make_worker()
        for item in reversed(items):
            yield from worker(item)

    def read(what: str, done: int, total: int | None) -> None:
        if what == "measuring":
            with (tmp_path / "sweep.csv").open() as file:
                times.append(sum(float(row["total_time"] or 0) for row in csv.DictReader(file)))

    run = RunFolder(tmp_path, "sweep", {})
    report = sweep(work(text_lm), EXAMPLES, GRID, run, exhaustive=True, mapper=backwards, on_progress=read)
    last = sum(row.total_time or 0 for row in report.rows)
    assert times == sorted(times)
    assert len(set(times)) == len(EXAMPLES)  # none, one and two prompts; the third is written after the last sample
    with (tmp_path / "sweep.csv").open() as file:
        assert sum(float(row["total_time"]) for row in csv.DictReader(file)) == pytest.approx(last)
