"""What commands measured is found in the files that they write, and nothing else is taken for a result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_tiny_adapters

from layerskip.cli.main import main
from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.export.hub.results import read_folder, read_results

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and what our commands measured of it."""
    root = tmp_path_factory.mktemp("measured")
    model = tiny_checkpoint(tokenizer=True)
    (root / "prompts.jsonl").write_text('{"prompt": "def add("}\n{"prompt": "class Stack:"}\n')
    data = ["--dataset", "custom_jsonl", "--data-path", str(root / "prompts.jsonl"), "--max-new-tokens", "6"]
    data += ["--model", str(model), "--ignore-eos"]
    assert main(["benchmark", *data, "--output-dir", str(root / "benchmark"), "--exit-layer", "2", "--json"]) == 0
    sweep = ["--exit-layer-first", "1", "--exit-layer-last", "2", "--num-speculations-last", "2", "--save", "--json"]
    assert main(["sweep", *data, *sweep, "--output-dir", str(root / "sweep")]) == 0
    model.rename(root / "model")
    return root


def test_a_benchmark_s_folder(measured: Path) -> None:
    (benchmark,) = read_results(measured / "benchmark").benchmarks
    written = json.loads((measured / "benchmark" / "results.json").read_text())["results"]["strategies"]
    assert [row.name for row in benchmark.strategies] == [row["name"] for row in written]
    assert [row.speedup for row in benchmark.strategies] == [row["speedup"] for row in written]
    assert benchmark.source.startswith("2 prompts, prompts.jsonl, ")
    assert str(measured) not in benchmark.source


def test_a_sweep_s_folder_and_the_setting_that_it_saved(measured: Path) -> None:
    from_run, from_folder = read_results(measured / "sweep"), read_folder(measured / "model")
    (best,) = from_run.recommendations
    (saved,) = from_folder.recommendations
    written = json.loads((measured / "sweep" / "results.json").read_text())["results"]["best"]
    assert (best.exit_layer, best.speedup) == (written["exit_layer"], pytest.approx(written["speedup"]))
    assert (saved.exit_layer, saved.num_speculations) == (best.exit_layer, best.num_speculations)
    assert [each.exit_layer for each in from_run.agreements[0].exits] == [1, 2]


def test_what_inspect_prints(measured: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["inspect", "--model", str(measured / "model"), "--max-tokens", "60", "--json"]) == 0
    (tmp_path / "inspect.json").write_text(capfd.readouterr().out)
    (agreement,) = read_results(tmp_path / "inspect.json").agreements
    assert [each.exit_layer for each in agreement.exits] == [1, 2, 3, 4]
    assert agreement.exits[-1].agreement == 1.0
    assert agreement.source == "a text of 59 tokens"


def test_exit_adapters_and_the_training_record(measured: Path, tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layerskip": {"exit_loss": "kl"}}))
    write_tiny_adapters(folder, folder, [2])
    found = read_folder(folder)
    assert found.recipe == {"exit_loss": "kl"}
    assert found.adapter_base == "tiny"
    assert found.agreements == ()  # these adapters' agreement was never measured


def test_a_result_that_is_given_twice_counts_once(measured: Path) -> None:
    once = read_results(measured / "sweep")
    assert (once + once).recommendations == once.recommendations


@pytest.mark.parametrize("content", [{}, {"exits": []}, {"model": "a"}])
def test_other_files_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InvalidArgumentError, match="no results that a model card can show; give a folder of"):
        read_results(tmp_path / "a.json")


def test_missing_and_damaged_files_are_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there are no results in"):
        read_results(tmp_path / "nothing")
    content = json.loads((measured / "sweep" / "results.json").read_text())
    del content["results"]["best"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**content, "kind": "eval"}))
    with pytest.raises(InvalidArgumentError, match="layerskip eval aren't part of a model card"):
        read_results(tmp_path)
