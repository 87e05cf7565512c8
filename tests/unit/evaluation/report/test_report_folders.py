"""Where reports come from and go: folders that have none, files that are replaced."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.report import compare_reports, write_report
from layerskip.evaluation.report.parts import reproduction
from layerskip.evaluation.run_folder import REPORT_FILE, RESULTS_FILE, SAMPLES_FILE, RunFolder


def finish(folder: Path, kind: str, results: dict[str, Any]) -> Path:
    run = RunFolder(folder, kind, {"model": "demo"})
    run.add("0", {})
    run.finish(results)
    return folder


def test_folders_without_a_report(tmp_path: Path) -> None:
    good = finish(tmp_path / "good", "verify", {"errors": 0})
    other = finish(tmp_path / "other", "eval", {})
    with pytest.raises(InvalidArgumentError, match="no finished run"):
        write_report(tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="of kind 'batch'; reports are there for benchmark"):
        write_report(finish(tmp_path / "batch", "batch", {}))
    with pytest.raises(InvalidArgumentError, match="only runs of one kind"):
        compare_reports([good, other], tmp_path / "out.html")
    with pytest.raises(InvalidArgumentError, match="at least two"):
        compare_reports([good], tmp_path / "out.html")
    with pytest.raises(InvalidArgumentError, match="a folder that exists"):
        compare_reports([good, good], tmp_path / "missing" / "out.html")
    with pytest.raises(InvalidArgumentError, match="is a folder"):
        compare_reports([good, good], tmp_path)


@pytest.mark.parametrize(
    "content", ["[1]", '{"schema": 1, "kind": "eval", "results": [1]}', '{"schema": 1, "kind": ["eval"]}', "{"]
)
def test_results_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULTS_FILE).write_text(content)
    (tmp_path / SAMPLES_FILE).write_text("")
    with pytest.raises(InvalidArgumentError):
        write_report(tmp_path)
    assert not (tmp_path / REPORT_FILE).exists()


def test_a_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = finish(tmp_path, "verify", {"errors": 0})
    path = folder / REPORT_FILE
    path.write_text("old")
    assert write_report(folder) == path
    assert path.read_text(encoding="utf-8") == write_report(folder).read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "report.html",
        "results.json",
        "run.json",
        "samples.jsonl",
    ]


def test_the_command_has_the_flags_of_the_configuration() -> None:
    config = GenerationConfig(max_new_tokens=9, block_verification=False, stop=("\n\n", "it's"), eos_token_ids=(1, 2))
    options = json.loads(json.dumps(asdict(config)))
    more = {"model": "my model", "dtype": "auto", "revision": None, "n_shot": 0, "strategies": ["a", "b"]}
    content = {"kind": "benchmark", "configuration": {**more, **options, "execute_code": False}}
    assert shlex.split(reproduction(content)) == [
        *("layerskip", "benchmark", "--model", "my model", "--n-shot", "0", "--strategies", "a,b"),
        *("--max-new-tokens", "9", "--no-block-verification", "--stop", "\n\n", "--stop", "it's"),
        *("--eos-token-ids", "1", "2"),
    ]


def test_a_grid_is_told_by_its_ends() -> None:
    grid = [[layer, length] for layer in (2, 4, 6) for length in (5,)]
    command = reproduction({"kind": "sweep", "configuration": {"grid": grid, "exhaustive": True}})
    assert command == (
        "layerskip sweep --exhaustive --exit-layer-first 2 --exit-layer-last 6 --exit-layer-step 2 "
        "--num-speculations-first 5 --num-speculations-last 5 --num-speculations-step 1"
    )
