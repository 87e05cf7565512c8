"""Commands that several processes run together, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import SOURCES, start_ranks

MOST_SECONDS = 30.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
GENERATE = ["--prompt", "def add(a, b):", "--max-new-tokens", "12", "--seed", "1", "--json"]


def layerskip(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerskip", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_is_killed_ends_the_others_with_a_message_that_names_it(tmp_path: Path, killed: int) -> None:
    processes = start_ranks(tmp_path, 3, "rank_work:wait_in_exchanges", pids=str(tmp_path))
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"{rank}.pid").exists() for rank in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)
    os.kill(int((tmp_path / f"{killed}.pid").read_text()), signal.SIGKILL)
    started = time.monotonic()
    for rank, process in enumerate(processes):
        if rank != killed:
            report = process.communicate(timeout=MOST_SECONDS)[1]
            assert process.returncode not in (0, None)
            assert f"rank {killed} of 3 died" in report
    assert time.monotonic() - started < MOST_SECONDS
    processes[killed].communicate()


def test_a_rank_that_fails_alone_ends_the_others_with_its_message(tmp_path: Path) -> None:
    processes = start_ranks(tmp_path, 2, "rank_work:fail_alone", rank=1)
    report = processes[0].communicate(timeout=120)[1]
    assert "rank 1 of 2 failed: the disk is full" in report
    assert processes[0].returncode == 2
    processes[1].communicate()


def test_a_command_starts_its_ranks_and_writes_once() -> None:
    alone = layerskip("generate", *GENERATE, "--kernels", "torch")
    together = layerskip("generate", *GENERATE, "--tensor-parallel", "2")
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["token_ids"] == json.loads(alone.stdout)["token_ids"]


def test_torchrun_starts_them_too() -> None:
    pytest.importorskip("torch.distributed.run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "layerskip", "generate"]
    done = subprocess.run([*command, *GENERATE], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 12


def test_all_ranks_get_the_messages_on_standard_input(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    flags = ("--max-new-tokens", "5", "--json", "--chat-template", str(template), "--tensor-parallel", "2")
    done = layerskip("chat", *flags, input="Hello!\nAnd again.\n")
    assert done.returncode == 0, done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["message"] for turn in turns] == ["Hello!", "And again."]


def test_results_are_written_by_one_rank_and_an_interrupted_batch_goes_on(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def a", "import", "class B")))
    flags = ("--input", str(prompts), "--max-new-tokens", "6", "--sample", "--batch-size", "2")
    first = layerskip("batch", *flags, "--output-file", str(tmp_path / "out.jsonl"), "--tensor-parallel", "2")
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_bad_arguments_are_one_line_and_exit_code_2() -> None:
    done = layerskip("generate", *GENERATE, "--tensor-parallel", "2", "--exit-layer", "99")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert "exit_layer 99 is outside 1..16" in done.stderr
    done = layerskip("generate", *GENERATE, "--tensor-parallel", "65")
    assert done.returncode == 2
    assert "at most 64" in done.stderr


def test_more_ranks_than_parts_are_refused() -> None:
    done = layerskip("generate", *GENERATE, "--tensor-parallel", "7")
    assert done.returncode == 2
    assert "tensor_parallel 7 is too much for this model's attention heads; use 1 to 6" in done.stderr
