"""The folder of a run: what survives an interruption, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.run_folder import RESULTS_FILE, SAMPLES_FILE, RunFolder, read_results

CONFIGURATION: dict[str, Any] = {"model": "demo", "num_samples": 3, "exits": [1, 2]}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", "sweep", CONFIGURATION)
    first.add("0", {"text": "ü\n\u2028x", "tokens": [1, 2]})
    first.add("1", {"text": "b"})
    with (tmp_path / "run" / SAMPLES_FILE).open("a") as file:
        file.write('{"key": "2", "te')  # killed in the middle of a line
    again = RunFolder(tmp_path / "run", "sweep", {**CONFIGURATION, "exits": (1, 2)})
    assert list(again.samples) == ["0", "1"]
    assert again.samples["0"] == {"key": "0", "text": "ü\n\u2028x", "tokens": [1, 2]}
    again.add("2", {"text": "c"})
    again.finish({"best": 1})
    content, samples = read_results(tmp_path / "run")
    assert [sample["key"] for sample in samples] == ["0", "1", "2"]
    assert content["kind"] == "sweep"
    assert content["results"] == {"best": 1}
    assert content["configuration"] == CONFIGURATION
    assert content["machine"]["versions"]["torch"]


def test_texts_that_end_in_half_a_character(tmp_path: Path) -> None:
    RunFolder(tmp_path, "sweep", {}).add("0", {"text": "x\ud83d"})
    assert RunFolder(tmp_path, "sweep", {}).samples["0"]["text"] == "x\ud83d"


def test_other_runs_need_other_folders(tmp_path: Path) -> None:
    RunFolder(tmp_path, "sweep", CONFIGURATION).add("0", {})
    with pytest.raises(InvalidArgumentError, match="num_samples 3, not 4"):
        RunFolder(tmp_path, "sweep", {**CONFIGURATION, "num_samples": 4})
    with pytest.raises(InvalidArgumentError, match="seed None, not 1"):
        RunFolder(tmp_path, "sweep", {**CONFIGURATION, "seed": 1})
    with pytest.raises(InvalidArgumentError, match="a run of layerskip sweep"):
        RunFolder(tmp_path, "eval", CONFIGURATION)


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="name a folder that can be written"):
        RunFolder(tmp_path / "file", "sweep", {})
    (tmp_path / SAMPLES_FILE).write_text("{}\n")
    with pytest.raises(InvalidArgumentError, match="of something else"):
        RunFolder(tmp_path, "sweep", {})
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InvalidArgumentError, match="is no run of layerskip"):
        RunFolder(tmp_path, "sweep", {})


def test_unfinished_runs_have_no_results(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "sweep", CONFIGURATION)
    run.add("0", {})
    with pytest.raises(InvalidArgumentError, match=r"results\.json is missing"):
        read_results(tmp_path)
    run.finish({})
    content = json.loads((tmp_path / RESULTS_FILE).read_text())
    (tmp_path / RESULTS_FILE).write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(InvalidArgumentError, match="another version"):
        read_results(tmp_path)
