"""A batch that is killed in the middle goes on with the same command, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BATCH = [sys.executable, "-c", "import sys; from layerskip.cli.batch import run; sys.exit(run(sys.argv[1:]))"]
NUM_LINES = 40
DECODING = "--batch-size 4 --max-new-tokens 80 --ignore-eos --exit-layer 2 --num-speculations 2 --temperature 0.8"


@pytest.fixture
def command(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All but the output file."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tiny_checkpoint(tokenizer=True, max_position_embeddings=256)
    lines = [{"prompt": f"def function_{'x' * (i % 7)}{i}(a):", "id": i} for i in range(NUM_LINES)]
    lines[3]["prompt"] = "too long " * 200
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*BATCH, "--model", str(model), "--input", str(tmp_path / "in.jsonl"), *DECODING.split(), "--json"]


def finish(command: list[str], output: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The summary and the output's lines; one line of the input is too long, so that the exit code is 1."""
    result = subprocess.run([*command, "--output-file", str(output)], capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (1, b"")
    return json.loads(result.stdout), output.read_bytes().splitlines(keepends=True)


def kill_after(command: list[str], output: Path, num_lines: int) -> list[bytes]:
    """Start, kill once so many lines are finished, and return those that are then."""
    partial = output.with_name(f"{output.name}.partial.jsonl")
    process = subprocess.Popen([*command, "--output-file", str(output)])
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 1 + num_lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it wrote nothing"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert not output.exists()
    return [line for line in partial.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]


def without_stats(lines: list[bytes]) -> list[dict[str, Any]]:
    return [{key: value for key, value in json.loads(line).items() if key != "stats"} for line in lines]


def test_killed_runs_end_as_an_undisturbed_one(command: list[str], tmp_path: Path) -> None:
    command += ["--seed", "7"]
    _, whole = finish(command, tmp_path / "whole.jsonl")
    assert [json.loads(line)["index"] for line in whole] == list(range(NUM_LINES))
    output = tmp_path / "out.jsonl"
    first = kill_after(command, output, 5)
    second = kill_after(command, output, len(first) + 5)
    assert second[: len(first)] == first
    assert len(second) < NUM_LINES
    summary, lines = finish(command, output)
    assert set(second) <= set(lines)  # to the last digit of their times: they weren't run again
    assert without_stats(lines) == without_stats(whole)
    assert (summary["resumed"], summary["lines"], summary["errors"]) == (len(second), NUM_LINES, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_another_input_or_seed_does_not_go_on(command: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    kept = kill_after(command, output, 5)
    result = subprocess.run(
        [*command, "--output-file", str(output), "--seed", "8"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "another configuration (seed None, not 8)" in result.stderr
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    result = subprocess.run(
        [*command, "--output-file", str(output)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "another configuration (input " in result.stderr
    partial = tmp_path / "out.jsonl.partial.jsonl"
    assert partial.read_bytes().splitlines(keepends=True)[1 : 1 + len(kept)] == kept


def test_a_seed_that_was_drawn_lasts(command: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    kill_after(command, output, 5)
    seed = json.loads((tmp_path / "out.jsonl.partial.jsonl").read_bytes().splitlines()[0])["seed"]
    _, lines = finish(command, output)
    _, whole = finish([*command, "--seed", str(seed)], tmp_path / "whole.jsonl")
    assert without_stats(lines) == without_stats(whole)
