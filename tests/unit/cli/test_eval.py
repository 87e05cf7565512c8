"""`layerskip eval`: what it prints and writes, its exit codes, its errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip.cli.measuring import eval as command
from layerskip.errors import InvalidArgumentError, LayerSkipError

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " None"], "gold": 0},
    {"question": "import os\nos.", "choices": ["x", "path"], "gold": 1},
]
SETTINGS = {
    "eval_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "eval_write": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the tasks are and where results go; outside of any repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": source, "test_split": "test", "doc_to_text": "{{question}}"}
    for name, settings in SETTINGS.items():  # JSON is YAML
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **settings}))
    return ["--include-path", str(tmp_path / "tasks"), "--output-dir", str(tmp_path / "out")]


def report_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command.run([*arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    report: dict[str, Any] = json.loads(out)
    return report


def test_every_exit_as_json_and_in_the_folder(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "eval_choice,eval_write", "--exit-layers", "4,16", "--num-speculations", "3", *flags]
    report = report_of(arguments, capfd)
    assert [e["exit_layer"] for e in report["results"]["exits"]] == [4, 16]
    assert all(set(e["tasks"]) == {"eval_choice", "eval_write"} for e in report["results"]["exits"])
    assert report["results"]["exits"][1]["speed"]["acceptance_rate"] > 0
    assert report["configuration"]["tasks"] == ["eval_choice", "eval_write"]
    assert "doesn't speed up log-likelihoods" in report["note"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == report["results"]
    assert "eval_choice" in (tmp_path / "out" / "report.html").read_text()
    assert list((tmp_path / "out" / "exit_4").glob("*/results_*.json"))
    samples = (tmp_path / "out" / "samples.jsonl").read_text()
    assert report_of(arguments, capfd)["results"] == report["results"]  # nothing is run again
    assert (tmp_path / "out" / "samples.jsonl").read_text() == samples
    with pytest.raises(InvalidArgumentError, match="another configuration"):
        command.run([*arguments, "--limit", "1"])


def test_tables_and_the_note_where_it_belongs(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    note = "Speculation doesn't speed up log-likelihoods"
    assert command.run(["--tasks", "eval_choice", "--generation-strategy", "ngram", *flags]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "quality by exit layer" in out
    assert "eval_choice" in out
    assert note in out
    other = [*flags[:-1], flags[-1] + "2"]
    assert command.run(["--tasks", "eval_choice", *other]) == 0
    assert note not in capfd.readouterr().out
    other = [*flags[:-1], flags[-1] + "3"]
    assert command.run(["--tasks", "eval_write", "--generation-strategy", "self_speculative", *other]) == 0
    out, _ = capfd.readouterr()
    assert note not in out
    assert "tokens per second" in out


def test_many_exits_stand_down(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A table of sixteen columns can't be read on a terminal."""
    assert command.run(["--tasks", "eval_choice", "--exit-layers", "all", *flags]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    numbered = [line for line in lines if line.startswith("│") and line.split()[1].isdigit()]
    assert [int(line.split()[1]) for line in numbered] == [*range(1, 17)] * 2
    assert "…" not in "".join(lines)


def test_early_exit_names_the_exit(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    early = ["--generation-strategy", "early_exit", "--exit-layer", "5"]
    (scores,) = report_of(["--tasks", "eval_write", "--limit", "1", *early, *flags], capfd)["results"]["exits"]
    assert scores["exit_layer"] == 5
    assert "acceptance_rate" not in scores["speed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit-layers", "17"], "exit_layer 17 is outside 1..16"),
        (["--exit-layers", "two"], "exit_layers must be positive whole numbers"),
        (["--limit", "0"], "limit must be a whole number of at least 1"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1"),
        (["--num-speculations", "0"], "num_speculations"),
        (["--tasks", ","], "no tasks were given"),
        (["--generation-strategy", "early_exit"], "needs either exit_layer or exit_layers"),
        (["--generation-strategy", "early_exit", "--exit-layer", "4", "--num-speculations", "2"], "early_exit doesn't"),
        (["--generation-strategy", "autoregressive", "--exit-layer", "4"], "use generation_strategy 'early_exit'"),
        (["--apply-chat-template"], "no chat template"),
    ],
)
def test_bad_input(flags: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(LayerSkipError, match=message):
        command.run(["--tasks", "eval_choice", *flags, *arguments])


@pytest.mark.slow
def test_an_unknown_task_is_told_with_names_like_it(flags: list[str]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"task 'eval_chioce' is not known; did you mean .*'eval_choice'"):
        command.run(["--tasks", "eval_chioce", *flags])
