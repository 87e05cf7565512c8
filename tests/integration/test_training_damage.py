"""Runs that resume after something was done to their files: to the last checkpoint, or to the data."""

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from layerskip.cli.main import main

Start = Callable[..., tuple[Path, Path]]


def train(output: Path, *flags: Any) -> tuple[int, str]:
    """Exit code, and what is said meanwhile."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        code = main(["train", *map(str, flags), "--output", str(output)])
    return code, err.getvalue()


@pytest.fixture(scope="module")
def flags(training_start: Start) -> list[str]:
    shape, texts = training_start(texts=6, lines=8, num_hidden_layers=2)
    settings = "--sequence-length 32 --batch-size 2 --max-steps 6 --save-steps 2 --keep 3 --precision float32"
    return ["--config", str(shape), "--data", str(texts), "--held-out", "0", *settings.split()]


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert train(output, *flags)[0] == 0
    return output


def unfinished(finished: Path, output: Path) -> Path:
    """The run as it was after four of six steps."""
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoint-6")
    for name in ("config.json", "model.safetensors"):
        (output / name).unlink()
    return output


def files(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", ["cut", "emptied", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_taken(
    flags: list[str], finished: Path, tmp_path: Path, harm: str
) -> None:
    for place, name in enumerate(files(finished / "checkpoint-4")):
        output = unfinished(finished, tmp_path / str(place))
        file = output / "checkpoint-4" / name
        content = file.read_bytes()
        file.unlink() if harm == "missing" else file.write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
        code, err = train(output, *flags, "--resume")
        assert code == 0, (name, err)
        if not (name == "files.json" and harm == "missing"):  # then nothing says that something is wrong, nor is it
            assert "checkpoint-4 is damaged" in err
        assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_no_intact_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    output = unfinished(finished, tmp_path / "run")
    for checkpoint in output.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    code, err = train(output, *flags, "--resume")
    assert code == 2
    assert "no checkpoint of the run is intact" in err
    assert "checkpoint-2 is damaged: optimizer.pt has 0 bytes of" in err


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_changed(flags: list[str], training_start: Start, tmp_path: Path, streaming: bool) -> None:
    shape, texts = training_start(texts=6, lines=8, num_hidden_layers=2)
    data = shutil.copytree(texts, tmp_path / "texts")
    own = ["--config", shape, "--data", data, *flags[4:], *(["--streaming"] if streaming else [])]
    output = tmp_path / "run"
    assert train(output, *own)[0] == 0
    shutil.rmtree(output / "checkpoint-6")
    first = (data / "0.txt").read_text()
    (data / "0.txt").write_text(first.replace("fox", "cat"))
    code, err = train(output, *own, "--resume")
    assert (code, err.splitlines()[-1].count("has changed since it began")) == (2, 1)
    assert f"{data}: other content" in err
    (data / "0.txt").write_text(first + "more\n")
    assert "bytes became" in train(output, *own, "--resume")[1]
    (data / "0.txt").write_text(first)
    (data / "6.txt").write_text("one more text\n")
    assert "6 files became 7 files" in train(output, *own, "--resume")[1]
    (data / "6.txt").unlink()
    assert train(output, *own, "--resume")[0] == 0
