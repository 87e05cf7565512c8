"""The program as a process: signals and closed pipes."""

import os
import signal
import subprocess
import sys

import pytest

LAYERSKIP = [sys.executable, "-m", "layerskip"]
LONG = ["generate", "--prompt", "def f(", "--max-new-tokens", "900", "--ignore-eos"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_ctrl_c_keeps_what_was_written() -> None:
    process = subprocess.Popen([*LAYERSKIP, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert len(first + rest) > 20
    assert rest.endswith(b"\n")


def test_a_closed_pipe_is_silent() -> None:
    process = subprocess.Popen([*LAYERSKIP, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"]])
def test_help_into_a_closed_pipe_is_silent(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run([*LAYERSKIP, *argv], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")
