"""Runs that are stopped, by whatever, and go on as if nothing had been."""

import io
import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import layerskip
import layerskip.training.run as run_module
from layerskip.cli.main import main
from layerskip.cli.terminal.training_progress import TrainingProgress
from layerskip.training.output.checkpoints import STAGING, list_checkpoints

NUM_STEPS = 8
SETTINGS = f"--sequence-length 32 --batch-size 2 --max-steps {NUM_STEPS} --learning-rate 3e-3 --dropout-max 0.4".split()
SAVING = "--save-steps 3 --eval-steps 4 --log-steps 1 --keep 1".split()


def train(output: Path, *flags: Any) -> tuple[int, str, str]:
    """Exit code, and what is printed to the two streams."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(["train", *map(str, flags), "--output", str(output)])
    return code, out.getvalue(), err.getvalue()


def in_child(run: Callable[[], Any]) -> int:
    """Run in a copy of this process, and return its exit code, or minus the signal that ended it.

    A new process would need ten seconds to import everything.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = int(run()[0])
        except BaseException:
            traceback.print_exc(file=open(2, "w", closefd=False))  # noqa: SIM115
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in log(output) if "loss" in entry]


@pytest.fixture(scope="module")
def flags(training_start: Callable[..., tuple[Path, Path]]) -> list[str]:
    # So few texts that the steps are more than one epoch; dropout draws from torch's generator, whose state a
    # checkpoint has to keep.
    shape, texts = training_start(
        texts=6, lines=8, num_hidden_layers=3, max_position_embeddings=64, attention_dropout=0.1
    )
    return ["--config", str(shape), "--data", str(texts), "--held-out", "0.2", *SETTINGS, *SAVING]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(output, *flags)[0] == 0
    assert [step for step, _ in losses(output)] == list(range(1, NUM_STEPS + 1))
    epochs = [entry["epoch"] for entry in log(output) if "loss" in entry]
    assert epochs[0] < 1 < epochs[-1]
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    """The result is bitwise the same, the log complete and without repetition, and nothing else is left."""
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert losses(output) == losses(undisturbed)
    evaluations = [entry["step"] for entry in log(output) if "eval_exit_1_loss" in entry]
    assert evaluations == [4, NUM_STEPS]
    results = [json.loads((each / "training.json").read_text()) for each in (output, undisturbed)]
    assert results[0]["exits"] == results[1]["exits"]
    assert (results[0]["step"], results[0]["interrupted"]) == (NUM_STEPS, False)
    assert {path.name for path in output.iterdir()} == {path.name for path in undisturbed.iterdir()}


def at_step(step: int, act: Callable[[], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Act when a step is reported."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(TrainingProgress, "step", lambda self, report: act() if report.step == step else None)

    return arrange


def at_move(source: str, *, after: bool = False) -> Callable[[pytest.MonkeyPatch], None]:
    """Die when a path is moved to or from a name."""
    replace = os.replace

    def watched(old: Any, new: Any, **options: Any) -> None:
        hit = source in (Path(old).name, Path(new).name)
        if hit and not after:
            die()
        replace(old, new, **options)
        if hit:
            die()

    return lambda patch: patch.setattr(os, "replace", watched)


def while_saving(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Die when a checkpoint's weights are there and its optimizer's state isn't."""
    save = Trainer._save_optimizer_and_scheduler

    def watched(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            die()
        return save(self, *args, **kwargs)

    return lambda patch: patch.setattr(Trainer, "_save_optimizer_and_scheduler", watched)


def before_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Die when the last step is done and saved, and nothing after it."""
    patch.setattr(run_module, "save_final", lambda *args, **kwargs: die())


MOMENTS = {
    "while the tokenizer is saved": (at_move("tokenizer_config.json", after=True), None),
    "before the first checkpoint": (at_step(2, die), None),
    "while the first checkpoint is written": (while_saving(3), None),
    "between checkpoints": (at_step(5, die), 3),
    "while the second checkpoint is written": (while_saving(6), 3),
    "before the second checkpoint is in its place": (at_move("checkpoint-6"), 3),
    "when the second checkpoint is in its place": (at_move("checkpoint-6", after=True), 6),
    "while the first checkpoint is deleted": (at_move(".deleted-checkpoint-3", after=True), 6),
    "before the result is saved": (before_evaluation, 8),
    "while the result is saved": (at_move("model.safetensors", after=True), 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(
    flags: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    output = tmp_path / "run"
    arrange, last = MOMENTS[moment]
    with monkeypatch.context() as patch:
        arrange(patch)
        assert in_child(lambda: train(output, *flags)) == -signal.SIGKILL
    assert not (output / "config.json").exists()
    assert not (output / "training.json").exists()
    assert [path.name for path in list_checkpoints(output)][-1:] == ([f"checkpoint-{last}"] if last else [])
    assert train(output, *flags, "--resume")[0] == 0
    check_same(output, undisturbed)


def test_killed_again_and_again(
    flags: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With streaming too, whose data are read up to their place anew each time."""
    assert train(tmp_path / "streamed", *flags, "--streaming")[0] == 0
    output, resume = tmp_path / "run", []
    for step in (1, 4, 5, 7):
        with monkeypatch.context() as patch:
            at_step(step, die)(patch)
            steps = ("--save-steps", 1 if step == 4 else 3)
            assert in_child(lambda f=(*flags, *steps, *resume): train(output, *f, "--streaming")) == -signal.SIGKILL
        resume = ["--resume"]
    assert train(output, *flags, "--streaming", *resume)[0] == 0
    check_same(output, tmp_path / "streamed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    flags: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Ctrl-C: the step that has begun is finished and saved."""
    output, report = tmp_path / "run", tmp_path / "report"

    def run() -> tuple[int, str, str]:
        result = train(output, *flags)
        report.write_text(json.dumps(result))
        return result

    with monkeypatch.context() as patch:
        at_step(4, lambda: os.kill(os.getpid(), number))(patch)
        assert in_child(run) == 130
    _, out, err = json.loads(report.read_text())
    assert "stopped after step" in out
    assert "go on with --resume" in out.replace("\n", " ")
    assert "Traceback" not in err
    (checkpoint,) = list_checkpoints(output)
    assert checkpoint.name in ("checkpoint-4", "checkpoint-5")
    assert json.loads((output / "training.json").read_text())["interrupted"] is True
    assert not (output / "config.json").exists()
    assert train(output, *flags, "--resume")[0] == 0
    check_same(output, undisturbed)


def test_interrupted_before_the_first_step(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "message", stop)
        assert train(tmp_path / "run", *flags) == (130, "", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_has_nothing_left_to_do(flags: list[str], undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(output, *flags)[0] == 0
    assert train(output, *flags, "--resume")[0] == 0
    check_same(output, undisturbed)


def test_lora_resumes(tiny_checkpoint: Callable[..., Path], flags: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    start = tiny_checkpoint(tokenizer=True, num_hidden_layers=3, attention_dropout=0.1)
    flags = ["--model", str(start), "--lora-rank", "2", *flags[2:]]
    assert train(tmp_path / "undisturbed", *flags)[0] == 0
    for step in (5, 8):
        output = tmp_path / f"killed at {step}"
        with monkeypatch.context() as patch:
            (at_step(step, die) if step < 8 else before_evaluation)(patch)
            assert in_child(lambda to=output: train(to, *flags)) == -signal.SIGKILL
        assert train(output, *flags, "--resume")[0] == 0
        check_same(output, tmp_path / "undisturbed")


# What can't be resumed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--dropout-max", "0.2"], "dropout_max 0.4, not 0.2"),
        (["--seed", "5"], "seed 0, not 5"),
        (["--max-steps", "9", "--rotation", "2"], "rotation None, not 2, max_steps 8, not 9"),
        (["--learning-rate", "0.1"], "learning_rate 0.003, not 0.1"),
    ],
)
def test_other_settings_are_refused(flags: list[str], undisturbed: Path, change: list[str], words: str) -> None:
    before = (undisturbed / "training.toml").read_text()
    code, out, err = train(undisturbed, *flags, *change, "--resume")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{undisturbed} holds a run with other settings" in err
    assert words in err
    assert (undisturbed / "training.toml").read_text() == before


def test_no_run_to_resume(flags: list[str], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        code, out, err = train(folder, *flags, "--resume")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"there is no run to resume in {folder}: it has no training.toml" in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten(flags: list[str], undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    code, out, err = train(undisturbed, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{undisturbed} already holds a training run; resume it, or choose another folder" in err
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


# Numbers that aren't


def test_a_learning_rate_too_high(flags: list[str], tmp_path: Path) -> None:
    code, out, err = train(tmp_path / "run", *flags, "--learning-rate", "1e30", "--warmup-steps", "0")
    assert (code, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("layerskip: error: the loss at step ")
    assert "is nan" in error or "is inf" in error
    assert "no checkpoint was written yet. A lower learning rate" in error


def test_a_loss_that_is_no_number(
    flags: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Trainer.compute_loss

    def spoiled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 and self.model.training else loss

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", spoiled)
        code, _, err = train(output, *flags)
    error = err.splitlines()[-1]
    assert code == 2
    assert f"the loss at step 5 is nan, so training has stopped; the last good checkpoint is {output}/checkpoint-3" in (
        error
    )
    assert train(output, *flags, "--resume")[0] == 0
    check_same(output, undisturbed)


def test_gradients_that_are_no_numbers(
    flags: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is one still, the weights aren't after the step: they don't replace the last good checkpoint."""
    compute = Trainer.compute_loss

    def spoiled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == 5 and self.model.training:
            return loss + (loss - loss.detach()).sqrt()  # adds 0, with an infinite slope
        return loss

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", spoiled)
        code, _, err = train(output, *flags)
    assert code == 2
    error = err.splitlines()[-1]
    assert "weights after step 6 aren't finite numbers, so training has stopped" in error
    assert f"the last good checkpoint is {output}/checkpoint-3" in error
    (kept,) = list_checkpoints(output)
    assert kept.name == "checkpoint-3"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())
    assert train(output, *flags, "--resume")[0] == 0
    check_same(output, undisturbed)


def test_checkpoints_are_models(flags: list[str], undisturbed: Path) -> None:
    (last,) = list_checkpoints(undisturbed)
    lm, result = (layerskip.load(str(each), device="cpu") for each in (last, undisturbed))
    assert torch.equal(lm.logits([5, 6, 7]), result.logits([5, 6, 7]))
    assert STAGING not in {path.name for path in undisturbed.iterdir()}
