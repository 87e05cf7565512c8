"""Measurements on two workers of a Ray cluster: the same texts, the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerskip.cli.main import main

pytest.importorskip("ray")

COMMANDS: dict[str, list[str]] = {
    "sweep": ["--exhaustive", "--exit-layer-last", "2", "--num-speculations-last", "2"],
    "benchmark": ["--strategies", "autoregressive,self_speculative,ngram"],
}


def run(name: str, model: Path, data: Path, output: Path, *more: str) -> dict[str, Any]:
    """Run a command; returns by key what doesn't depend on the clock."""
    named = ["--model", str(model), "--dataset", "custom_jsonl", "--data-path", str(data), "--max-new-tokens", "16"]
    assert main([name, *named, *COMMANDS[name], "--output-dir", str(output), *more]) == 0
    assert (output / "results.json").exists()
    assert (output / "report.html").exists()
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    kept = ("token_ids", "agreement", "drafted", "accepted", "text", "reference")
    # which settings are tried first, and run once more in the end, depends on the clock
    lines = [line for line in lines if not line["key"].startswith(("trial/", "final/"))]
    return {line["key"]: {field: line.get(field) for field in kept} for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_two_workers(name: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    model, data = tiny_checkpoint(tokenizer=True), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"def f{i}(x, y):\n    return"}) + "\n" for i in range(7)))
    here = run(name, model, data, tmp_path / "here")
    there = run(name, model, data, tmp_path / "there", "--ray", "--num-workers", "2")
    assert there == here
    assert len(here) > 7


def test_an_evaluation_on_two_workers(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("lm_eval")
    model, tasks = tiny_checkpoint(tokenizer=True), tmp_path / "tasks"
    tasks.mkdir()
    documents = [{"question": f"x = {i}\ny =", "choices": [" 1", " 2"], "gold": i % 2} for i in range(8)]
    (tasks / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "ray_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tasks / "documents.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "ray_choice.yaml").write_text(json.dumps(task))
    flags = [
        "eval",
        "--model",
        str(model),
        "--tasks",
        "ray_choice",
        "--include-path",
        str(tasks),
        "--exit-layers",
        "2,4",
    ]
    assert main([*flags, "--output-dir", str(tmp_path / "here")]) == 0
    assert main([*flags, "--output-dir", str(tmp_path / "there"), "--ray", "--num-workers", "2"]) == 0
    # all came from the workers, for both exits
    assert len((tmp_path / "there" / "samples.jsonl").read_text().splitlines()) == 2 * 2 * len(documents)
    here, there = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there"))
    assert [e["tasks"] for e in there["results"]["exits"]] == [e["tasks"] for e in here["results"]["exits"]]
