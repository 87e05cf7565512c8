"""Measurements that are killed go on where they stopped, and come to the results of undisturbed ones."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PROMPTS = ["--dataset", "custom_jsonl", "--data-path", "prompts.jsonl", "--max-new-tokens", "60"]
FIXED = ["--generation-strategy", "self_speculative"]
COMMANDS: dict[str, list[str]] = {
    "sweep": [*PROMPTS, "--exhaustive", "--exit-layer-last", "2", "--num-speculations-last", "3"],
    "benchmark": [*PROMPTS, "--strategies", "autoregressive,self_speculative,ngram"],
    "eval": ["--tasks", "choose,write", "--include-path", ".", "--exit-layers", "2,4", *FIXED],
}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["{{a}}", "{{b}}", " x"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_data(folder: Path) -> None:
    """Prompts, and tasks of the harness with the same ones."""
    rows = [{"prompt": f"def f{i}(x, y):\n    return", "a": f" x + {i}", "b": f" y - {i}"} for i in range(25)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "prompts.jsonl")}}}
        task = {"task": name, "test_split": "test", "doc_to_text": "{{prompt}}", **data, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task))


def command(name: str, model: Path, output: Path) -> list[str]:
    named = ["--model", str(model), *COMMANDS[name], "--output-dir", str(output), "--json"]
    return [sys.executable, "-m", "layerskip", name, *named]


def kill_in_the_middle(argv: list[str], folder: Path, samples: Path, after: int) -> int:
    """SIGKILL once so many samples were written; returns how many there are."""
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not samples.exists() or samples.read_bytes().count(b"\n") < after):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return samples.read_bytes().count(b"\n")


def facts(folder: Path) -> dict[str, Any]:
    """What doesn't depend on the clock, by sample."""
    timed = {"seconds", "prompt_seconds", "stats", "memory_bytes", "options"}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = {line["key"]: {name: value for name, value in line.items() if name not in timed} for line in lines}
    assert len(found) == len(lines)  # nothing was done twice
    return {key: sample for key, sample in found.items() if key.partition("/")[0] not in ("costs", "trial", "final")}


def results(folder: Path) -> Any:
    """The scores of an evaluation; speeds depend on the clock."""
    content = json.loads((folder / "results.json").read_text())
    return content["kind"], [exit_["tasks"] for exit_ in content["results"].get("exits", [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(name: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    if name == "eval":
        pytest.importorskip("lm_eval")
    model = tiny_checkpoint(tokenizer=True)
    write_data(tmp_path)
    argv = command(name, model, tmp_path / "killed")
    samples = tmp_path / "killed" / "samples.jsonl"
    kept = kill_in_the_middle(argv, tmp_path, samples, after=30)
    before = samples.read_text().splitlines()[:kept]
    run = partial(subprocess.run, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    run(argv)
    assert samples.read_text().splitlines()[:kept] == before
    run(command(name, model, tmp_path / "whole"))
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    assert len(facts(tmp_path / "whole")) > kept
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert results(tmp_path / "killed")[0] == name
