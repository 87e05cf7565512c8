"""What the terminal shows while files are prepared."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import packages
import pytest

from layerskip.checkpoint import checkpoint
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments
from layerskip.cli.flags.ray import anywhere
from layerskip.cli.terminal import terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "output", "visible"),
    [
        (1.9, OutputArguments(), False),
        (2.1, OutputArguments(), True),
        (2.1, OutputArguments(json=True), False),
    ],
)
def test_a_bar_for_long_work_only(
    seconds: float, output: OutputArguments, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, clock = Screen(), iter([0.0, seconds, seconds])
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "monotonic", lambda: next(clock))
    monkeypatch.setenv("TERM", "xterm")
    with terminal.late_bar(output, "preparing some") as report:
        report(1_000_000, 4_000_000)
        report(2_000_000, 4_000_000)
    text = screen.getvalue()
    assert ("preparing some" in text and "4.0 MB" in text) is visible
    assert bool(text) is visible


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 9.0])
    monkeypatch.setattr(terminal, "monotonic", lambda: next(clock))
    with terminal.late_bar(OutputArguments(), "preparing some") as report:
        report(1, 4)
    assert capsys.readouterr() == ("", "")


def test_what_a_worker_in_another_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths become absolute, of files too; names and hub ids stay."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "demo", "smollm2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model.gguf").touch()
    told = {name: anywhere(ModelArguments(model=name)).model for name in ("mine", "model.gguf", "./smollm2")}
    assert told == {
        "mine": f"{tmp_path}/mine",
        "model.gguf": f"{tmp_path}/model.gguf",
        "./smollm2": f"{tmp_path}/smollm2",
    }
    for name in ("demo", "smollm2", "owner/name"):
        assert anywhere(ModelArguments(model=name)).model == name


@pytest.mark.parametrize("command", ["inspect", "generate", "verify", "chat", "sweep", "train"])
def test_a_named_model_that_is_half_there(
    command: str, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, contents = packages.make_model(2)
    first, second = packages.install_all(tmp_path, model, contents).values()
    second.unlink()
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "MODELS", {"some": model})
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n" * 100)
    more = {
        "generate": ["--prompt", "x"],
        "sweep": ["--dataset", "cnn_dm_lm", "--data-path", str(texts)],
        "train": ["--data", str(texts), "--output", str(tmp_path / "out")],
    }
    with packages.named("some", model, tmp_path):
        outcome = cli(command, "--model", "some", *more.get(command, []))
    assert (outcome.code, outcome.out) == (2, "")
    *before, last = outcome.err.splitlines()
    assert set(before) <= {"preparing the model", "reading the data"}  # what `train` says
    assert "some is installed only in part, without data/weights.part1 of some-model-part1 1.0.0" in last
    assert first.exists()
