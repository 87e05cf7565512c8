"""Measurements that are killed go on where they stopped, and come to the results of undisturbed ones."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS: dict[str, list[str]] = {
    "sweep": ["--exhaustive", "--exit-layer-last", "2", "--num-speculations-last", "3"],
    "benchmark": ["--strategies", "autoregressive,self_speculative,ngram"],
}


def command(name: str, model: Path, data: Path, output: Path) -> list[str]:
    named = ["--model", str(model), "--dataset", "custom_jsonl", "--data-path", str(data), "--max-new-tokens", "60"]
    return [sys.executable, "-m", "layerskip", name, *named, *COMMANDS[name], "--output-dir", str(output), "--json"]


def kill_in_the_middle(argv: list[str], samples: Path, after: int) -> int:
    """SIGKILL once so many samples were written; returns how many there are."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    found.pop("costs", None)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(name: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    model, data = tiny_checkpoint(tokenizer=True), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"def f{i}(x, y):\n    return"}) + "\n" for i in range(25)))
    argv = command(name, model, data, tmp_path / "killed")
    samples = tmp_path / "killed" / "samples.jsonl"
    kept = kill_in_the_middle(argv, samples, after=30)
    before = samples.read_text().splitlines()[:kept]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    assert samples.read_text().splitlines()[:kept] == before
    subprocess.run(command(name, model, data, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    assert len(facts(tmp_path / "whole")) > kept
    content = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert content["kind"] == name
