"""Standard streams as shells leave them: closed, full, gone, or in an encoding that lacks characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip.cli.main import main

GENERATE = ["generate", "--prompt", "x = '日本'", "--max-new-tokens", "2"]
INSPECT = ["inspect", "--prompt", "def add(a, b):"]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def run(*argv: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; `shell` are redirections."""
    command = f'exec "$0" -m layerskip "$@" {shell}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_encodings_that_lack_characters(encoding: str) -> None:
    for argv in (INSPECT, [*GENERATE, "--json"]):
        outcome = run(*argv, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert outcome.stdout.isascii() or encoding == "latin-1"


def test_characters_become_escapes() -> None:
    outcome = run(
        "generate", "--prompt", "'日本' = '日本' = '日本' = '", "--max-new-tokens", "12", PYTHONIOENCODING="ascii"
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.isascii()


@needs_full
@pytest.mark.parametrize("argv", [GENERATE, [*GENERATE, "--json"], INSPECT, ["--help"], ["sweep", "--help"]], ids=str)
def test_a_full_device(argv: list[str]) -> None:
    outcome = run(*argv, shell="> /dev/full")
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert "No space left on device" in outcome.stderr


@pytest.mark.parametrize("argv", [GENERATE, INSPECT, ["--version"]], ids=str)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(argv: list[str], closed: str) -> None:
    outcome = run(*argv, shell=closed)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_errors_with_no_place_to_go() -> None:
    for shell in ("2>&-", "2> /dev/full" if Path("/dev/full").exists() else "2>&-"):
        outcome = run("generate", "--model", "nowhere/at/all", shell=shell)
        assert (outcome.returncode, outcome.stdout, outcome.stderr) == (2, "", "")


def test_a_reader_that_has_gone() -> None:
    outcome = run(*GENERATE[:-1], "200", shell="| head -c 1")
    assert outcome.stderr == ""


def test_results_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples that are finished stay, the error is one line, and the run goes on when there is room."""
    from layerskip.evaluation import run_folder

    arguments = ["benchmark", "--dataset", "custom_jsonl", "--strategies", "autoregressive", "--max-new-tokens", "2"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments += ["--data-path", str(file), "--output-dir", str(tmp_path / "run")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", full)
        code, told = main(arguments), capsys.readouterr().err
    assert (code, told.count("\n")) == (2, 1)
    assert "No space left on device" in told
    assert main(arguments) == 0
