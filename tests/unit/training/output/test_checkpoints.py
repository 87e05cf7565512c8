"""Checkpoints are there whole or not at all, whatever stops the writing."""

import errno
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from layerskip.cli.main import main
from layerskip.cli.terminal.training_progress import TrainingProgress
from layerskip.errors import CheckpointError
from layerskip.training.output.checkpoints import (
    STAGING,
    checkpoint_step,
    delete,
    list_checkpoints,
    move_into_place,
    writing,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def make(output: Path, *steps: int) -> None:
    for step in steps:
        (output / f"checkpoint-{step}").mkdir(parents=True)
        (output / f"checkpoint-{step}" / "weights").write_text(f"of {step}")


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    make(tmp_path, 900, 1000, 20)
    for other in ("checkpoint-", "checkpoint-x", "checkpoint-5-old", ".deleted-checkpoint-7", "checkpoint-1.5"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-2000").write_text("a file")
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [20, 900, 1000]
    assert list_checkpoints(tmp_path / "nothing") == []


def test_a_deleted_checkpoint_is_gone(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    delete(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_half_deleted_checkpoint_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr("layerskip.training.output.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
        delete(tmp_path / "checkpoint-1")
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    with writing(tmp_path, "checkpoint-3"):  # tidies up
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", STAGING}


def test_moving_replaces_the_whole_folder(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with writing(tmp_path, "checkpoint-1") as staging:
        make(staging, 1)
        (staging / "checkpoint-1" / "weights").write_text("new")
        assert (tmp_path / "checkpoint-1" / "weights").read_text() == "of 1"
        move_into_place(staging / "checkpoint-1", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_staging_starts_empty(tmp_path: Path) -> None:
    make(tmp_path / STAGING, 1)  # left by a process that was killed
    with writing(tmp_path / "new" / "run", "x") as staging:
        assert staging.is_dir()
    with writing(tmp_path, "x") as staging:
        assert list(staging.iterdir()) == []
    assert not staging.exists()


@pytest.mark.parametrize(
    "error", [FULL, SafetensorError("IO error"), RuntimeError("[enforce fail] write"), Exception("tokenizers")]
)
def test_failed_writing_leaves_the_earlier_ones(tmp_path: Path, error: Exception) -> None:
    make(tmp_path, 1, 2)

    def write() -> None:
        with writing(tmp_path, "checkpoint-3") as staging:
            make(staging, 3)
            raise error

    with pytest.raises(CheckpointError) as caught:
        write()
    message = str(caught.value)
    assert message.startswith(f"cannot write checkpoint-3 in {tmp_path}: {error}; ")
    assert message.endswith(f"{tmp_path / 'checkpoint-2'}, is untouched: make room, then go on with --resume")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "of 2"


def test_failed_writing_of_the_first_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint is there yet"), writing(tmp_path, "checkpoint-3"):
        raise FULL
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"), writing(tmp_path / "file", "checkpoint-1"):
        pytest.fail("there is nothing to write into")


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_other_errors_keep_their_names(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path, 1)
    with pytest.raises(type(error)), writing(tmp_path, "checkpoint-2"):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# A disk that is really full, as far as a process can tell: no file may grow beyond a size


def train(*flags: Any) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(["train", *map(str, flags)])
    return code, out.getvalue(), err.getvalue()


def in_child(run: Callable[[], object]) -> int:
    """Run in a copy of this process, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = int(str(run()))
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def flags(training_start: Callable[..., tuple[Path, Path]]) -> list[str]:
    import layerskip.training.run  # noqa: F401  # takes seconds: once here, not in each child

    shape, texts = training_start(texts=1, lines=99, num_hidden_layers=3, max_position_embeddings=64)
    text = "--sequence-length 32 --batch-size 2 --max-steps 6 --save-steps 2 --log-steps 1 --dropout-max 0.3".split()
    return ["--config", str(shape), "--data", str(texts), *text]


@pytest.mark.parametrize(("first", "limit"), [(0, 1_000), (3, 10_000), (3, 60_000), (3, 200_000)])
def test_a_full_disk(flags: list[str], tmp_path: Path, first: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file of the checkpoint is the one for which there is no room: weights, optimizer, tokenizer."""
    output, report = tmp_path / "run", tmp_path / "report"
    full: Callable[..., None] = lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731

    def run() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = report.open("w")  # as large as it will have to be, before there is a limit
        room.write(" " * 2 * max(limit, 4096))
        room.flush()
        step = TrainingProgress.step
        monkeypatch.setattr(
            TrainingProgress, "step", lambda self, now: full() if now.step == first else step(self, now)
        )
        if first == 0:
            monkeypatch.setattr(TrainingProgress, "message", full)
        code, out, err = train(*flags, "--output", output)
        os.pwrite(room.fileno(), json.dumps([code, out, err]).encode(), 0)
        return code

    assert in_child(run) == 2
    code, out, err = json.loads(report.read_text().rstrip())
    assert (code, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("layerskip: error: ")
    assert "Traceback" not in err
    for words in ("can", "writ", "make room", "--resume"):
        assert words in error
    kept = [output / "checkpoint-2"] if first else []
    assert list_checkpoints(output) == kept
    assert all(str(path) in error for path in kept)
    assert not (output / STAGING).exists()
    assert not (output / "config.json").exists()

    assert train(*flags, "--output", output, "--resume")[0] == 0
    assert train(*flags, "--output", tmp_path / "undisturbed")[0] == 0
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "undisturbed"))
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
