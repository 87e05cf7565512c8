"""A verification finds what is lost, forgives rounding, and nothing else; and goes on where it was interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip.decoding import engine
from layerskip.decoding.batch import Batch
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.policy import Plan, RoundResult
from layerskip.decoding.rounds import verifying
from layerskip.errors import InvalidArgumentError, PromptError
from layerskip.evaluation.run_folder import SAMPLES_FILE, RunFolder
from layerskip.evaluation.samples import SampleStore
from layerskip.evaluation.verify.compare import VerifyPlan, make_plan
from layerskip.evaluation.verify.run import CONDITIONS, to_results, verify

CONFIG = GenerationConfig(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=3)
PROMPTS = [[5, 9, 11], [7, 8]]
MORE_PROMPTS = [*PROMPTS, [3]]
SETTINGS = [(1, 2), (3, 4)]


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")


def plan_of(lm: layerskip.LanguageModel, settings: Any = SETTINGS, **options: Any) -> VerifyPlan:
    return make_plan(lm, settings, config=CONFIG, **options)


def test_equal_texts_are_counted_for_each_setting(lm: layerskip.LanguageModel) -> None:
    report = verify(lm, PROMPTS, plan_of(lm))
    assert [(s.exit_layer, s.num_speculations, s.mode) for s in report.settings] == [
        (1, 2, "greedy"),
        (3, 4, "greedy"),
        (1, 2, "coupled"),
        (3, 4, "coupled"),
    ]
    assert all((s.equal, s.near_ties, s.errors) == (2, 0, 0) for s in report.settings)
    assert all(s.tokens == 24 and s.drafted > 0 for s in report.settings)
    assert report.errors == 0


@pytest.fixture
def accepts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every draft, right or wrong; round by round, as compiled code accepts by itself within a call."""
    one_by_one = verifying.run_rounds

    def run_one(batch: Batch, plan: Plan, **options: Any) -> list[RoundResult]:
        return one_by_one(batch, plan)

    monkeypatch.setattr(engine, "run_rounds", run_one)
    monkeypatch.setattr(verifying, "accept_matching", lambda drafts, targets: len(drafts))


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
@pytest.mark.usefixtures("accepts_all")
def test_a_wrong_acceptance_rule_is_an_error(lm: layerskip.LanguageModel, mode: Any) -> None:
    report = verify(lm, PROMPTS, plan_of(lm, [(1, 4)], modes=(mode,)))
    assert report.errors == 2
    first = report.settings[0].divergences[0]
    assert not first.near_tie
    assert first.expected != first.actual


def test_a_text_that_ends_early_is_an_error(lm: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lm.generate

    def cuts(prompts: Any, config: GenerationConfig) -> Any:
        results = honest(prompts, config)
        if config.speculates:
            for result in results:
                del result.token_ids[6:]
        return results

    monkeypatch.setattr(lm, "generate", cuts)
    report = verify(lm, PROMPTS, plan_of(lm, [(2, 2)], modes=("greedy",)))
    assert report.errors == 2
    assert report.settings[0].divergences[0].position == 6
    assert report.settings[0].divergences[0].actual is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": [], "settings": [(1, 1)]},
        {"prompts": PROMPTS, "settings": []},
        {"prompts": PROMPTS, "settings": [(5, 1)]},
        {"prompts": PROMPTS, "settings": [(1, 0)]},
        {"prompts": PROMPTS, "settings": [(1, 1)], "batch_size": 0},
    ],
)
def test_bad_arguments(lm: layerskip.LanguageModel, arguments: dict[str, Any]) -> None:
    prompts = arguments.pop("prompts")
    with pytest.raises(InvalidArgumentError):
        verify(lm, prompts, make_plan(lm, **arguments))


def test_tolerance_is_stated_by_dtype(tiny_checkpoint: Any) -> None:
    model = layerskip.load(str(tiny_checkpoint()), dtype="bfloat16", device="cpu")
    report = verify(model, PROMPTS, plan_of(model, [(2, 2)], modes=("greedy",)))
    assert model.decoder.dtype == torch.bfloat16
    assert report.tolerance == 0.5
    assert report.errors == 0


@pytest.fixture
def calls(lm: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of each call of `generate`."""
    honest, sizes = lm.generate, list[int]()

    def counts(prompts: Any, config: GenerationConfig) -> Any:
        sizes.append(len(prompts))
        return honest(prompts, config)

    monkeypatch.setattr(lm, "generate", counts)
    return sizes


def run_in(folder: Path, lm: layerskip.LanguageModel, plan: VerifyPlan, prompts: Any = MORE_PROMPTS) -> Any:
    """The results of a run in a folder; JSON."""
    run = RunFolder(folder, "verify", {})
    return to_results(verify(lm, prompts, plan, run), run)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_folder_changes_nothing(
    lm: layerskip.LanguageModel, tmp_path: Path, request: pytest.FixtureRequest, batch_size: int, wrong: bool
) -> None:
    if wrong:
        request.getfixturevalue("accepts_all")
    told: list[tuple[str, int, int | None]] = []

    def tell(what: str, done: int, total: int | None) -> None:
        told.append((what, done, total))

    plan = plan_of(lm, batch_size=batch_size)
    memory, run = SampleStore(), RunFolder(tmp_path, "verify", {})
    expected = verify(lm, MORE_PROMPTS, plan, memory)
    report = verify(lm, MORE_PROMPTS, plan, run, on_progress=tell)
    assert report == expected
    assert run.samples == memory.samples
    assert (report.errors > 0) == wrong
    assert told[-1][1:] == (3 * 2 * 3, 3 * 2 * 3)
    again = verify(lm, MORE_PROMPTS, plan, run, on_progress=tell)
    assert again == expected
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    results = to_results(report, run)
    assert results["prompts"] == 3
    assert results["tokens"] == sum(s.tokens for s in expected.settings) == 3 * 2 * 2 * 12
    assert results["differences"] == results["errors"] == expected.errors == len(results["divergences"])
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("stop", range(12))
@pytest.mark.usefixtures("accepts_all")
def test_an_interrupted_run_goes_on(
    lm: layerskip.LanguageModel, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Two batches, each decoded plainly and by two settings, in two modes."""
    plan = plan_of(lm, batch_size=2)
    whole = run_in(tmp_path / "whole", lm, plan)
    assert calls == [2] * 6 + [1] * 6
    counted = lm.generate
    calls.clear()

    def stops(prompts: Any, config: GenerationConfig) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        return counted(prompts, config)

    monkeypatch.setattr(lm, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "stopped", lm, plan)
    monkeypatch.setattr(lm, "generate", counted)
    assert run_in(tmp_path / "stopped", lm, plan) == whole
    assert len(calls) == 12  # nothing was decoded twice
    assert whole["errors"] > 0
    files = [(tmp_path / name / SAMPLES_FILE).read_text() for name in ("whole", "stopped")]
    assert files[0] == files[1]


@pytest.mark.usefixtures("accepts_all")
def test_a_run_that_was_killed_anywhere_goes_on(lm: layerskip.LanguageModel, tmp_path: Path, calls: list[int]) -> None:
    plan = plan_of(lm, [(1, 4)], modes=("greedy",), batch_size=2)
    whole = run_in(tmp_path / "whole", lm, plan)
    lines = (tmp_path / "whole" / SAMPLES_FILE).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 3
    for kept in range(len(lines)):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
        (folder / SAMPLES_FILE).write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        calls.clear()
        assert run_in(folder, lm, plan) == whole
        assert (folder / SAMPLES_FILE).read_bytes().splitlines(keepends=True) == lines
        # Of the lines, the first tells the conditions, and the others come from four batches: 2, 2, 1, 1.
        assert len(calls) == [4, 4, 4, 3, 3, 2, 1][kept]


@pytest.mark.usefixtures("accepts_all")
def test_differences_are_kept_with_their_text(tiny_checkpoint: Any, tmp_path: Path) -> None:
    lm = layerskip.load(str(tiny_checkpoint(tokenizer=True)), dtype="float32", device="cpu")
    prompts = lm.encode(["def add(a, b):", "import os\n"])
    plan = make_plan(lm, [(1, 4)], modes=("greedy",), config=CONFIG, tolerance=0.0)
    run = RunFolder(tmp_path, "verify", {})
    results = to_results(verify(lm, prompts, plan, run, indices=[7, 3]), run)
    assert [d["index"] for d in results["divergences"]] == [7, 3]
    for place, found in enumerate(results["divergences"]):
        assert (found["mode"], found["exit_layer"], found["num_speculations"]) == ("greedy", 1, 4)
        assert (found["prompt"], found["tolerance"], found["near_tie"]) == (place, 0.0, False)
        text = run.samples[f"{place}/greedy"]["token_ids"]
        position = found["position"]
        assert found["expected"] == text[position] != found["actual"]
        assert found["before"] == lm.tokenizer.decode([*prompts[place], *text[:position]])
        assert found["expected_text"] == lm.tokenizer.decode(text[position:])
        assert found["actual_text"].startswith(lm.tokenizer.decode([found["actual"]]))
        logits = lm.logits([*prompts[place], *text[:position]])[-1]
        best, second = logits.topk(2).values.tolist()
        assert found["top2_gap"] == pytest.approx(best - second, rel=1e-4)
        assert found["gap"] == pytest.approx(best - float(logits[found["actual"]]), rel=1e-4)
        assert found["gap"] >= found["top2_gap"] > 0
        kept = run.samples[f"{place}/greedy/1/4"]
        setting = {"mode": "greedy", "exit_layer": 1, "num_speculations": 4, "index": [7, 3][place]}
        assert found == {**kept["divergence"], **setting}


@pytest.mark.usefixtures("accepts_all")
def test_near_ties_are_kept_and_no_errors(lm: layerskip.LanguageModel, tmp_path: Path) -> None:
    results = run_in(tmp_path, lm, plan_of(lm, [(1, 4)], modes=("greedy",), tolerance=1e3))
    assert (results["differences"], results["near_ties"], results["errors"]) == (3, 3, 0)
    assert all(found["near_tie"] and found["tolerance"] == 1e3 for found in results["divergences"])
    assert all(found["before"] is None for found in results["divergences"])  # there is no tokenizer
    assert results["settings"][0]["near_ties"] == 3


def test_texts_under_other_conditions_are_not_compared(
    lm: layerskip.LanguageModel, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    plan = plan_of(lm, [(1, 2)], modes=("greedy",))
    run_in(tmp_path, lm, plan)
    with pytest.raises(InvalidArgumentError, match=r"under other conditions \(prompts "):
        run_in(tmp_path, lm, plan, PROMPTS)
    half = layerskip.load(str(tiny_checkpoint()), dtype="bfloat16", device="cpu")
    with pytest.raises(InvalidArgumentError, match=r"dtype 'float32', not 'bfloat16'.*name another folder"):
        run_in(tmp_path, half, replace(plan, tolerance=0.5))
    assert RunFolder(tmp_path, "verify", {}).samples[CONDITIONS]["device"] == "cpu"
    store = SampleStore()
    verify(lm, PROMPTS, plan, store)
    with pytest.raises(InvalidArgumentError, match="memory has comparisons made under other conditions"):
        verify(lm, MORE_PROMPTS, plan, store)


def test_a_prompt_without_room_is_found_before_anything_is_decoded(
    lm: layerskip.LanguageModel, tmp_path: Path, calls: list[int]
) -> None:
    with pytest.raises(PromptError, match="prompt 1 has 128 tokens"):
        run_in(tmp_path, lm, plan_of(lm), [[5], [6] * 128])
    with pytest.raises(InvalidArgumentError, match="at least one prompt"):
        run_in(tmp_path, lm, plan_of(lm), [])
    assert calls == []
    assert list(tmp_path.iterdir()) == []
