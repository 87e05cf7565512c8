"""Trainer callbacks of a run: progress reports, the log on disk, Ctrl-C."""

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from layerskip.errors import CheckpointError
from layerskip.training.output.output_folder import LOG_FILE

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Progress of a run after an optimizer step."""

    step: int
    num_steps: int
    loss: float | None
    """Nats: mean J since the last log entry; None before the first entry."""
    tokens_per_second: float
    """Tokens of all processes per second, since the run started or resumed; the time of evaluations isn't counted."""


OnStep = Callable[[StepReport], None]


class ProgressCallback(TrainerCallback):
    """Reports the progress after every step, with a speed that leaves evaluations out."""

    def __init__(self, on_step: OnStep, *, tokens_per_step: int) -> None:
        """Call `on_step` after each step; `tokens_per_step` is the sum over all processes."""
        self._on_step = on_step
        self._tokens_per_step = tokens_per_step
        self._loss: float | None = None
        self._num_steps, self._seconds, self._started = 0, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._num_steps += 1
        self._seconds += time.perf_counter() - self._started
        speed = self._num_steps * self._tokens_per_step / max(self._seconds, 1e-9)
        self._on_step(
            StepReport(
                step=state.global_step, num_steps=state.max_steps, loss=self._loss, tokens_per_second=round(speed, 1)
            )
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)


class EvaluationCallback(TrainerCallback):
    """Reports the result of each evaluation."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        """Call `on_message` with one line for each evaluation."""
        self._on_message = on_message

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        num_layers = sum(name.startswith("eval_exit_") and name.endswith("_loss") for name in logs or {})
        if not num_layers:
            return
        early = sorted({max(1, num_layers // 4), max(1, num_layers // 2)})
        agreements = ", ".join(f"{logs[f'eval_exit_{exit_}_agreement']:.1%} at exit {exit_}" for exit_ in early)
        best = max(range(1, num_layers + 1), key=lambda exit_: logs[f"eval_exit_{exit_}_speedup"])
        loss = logs[f"eval_exit_{num_layers}_loss"]
        self._on_message(
            f"step {state.global_step}: held-out loss {loss:.3f}, agreement {agreements}; "
            f"ideal speedup {logs[f'eval_exit_{best}_speedup']:.2f} at exit {best}"
        )


class AlreadyFinished(Exception):
    """A run resumes from its last step. No step is left, but Trainer would run one more."""


class FinishedCallback(TrainerCallback):
    """Ends a run that resumes from its last step, once the model is loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyFinished


class LogCallback(TrainerCallback):
    """Keeps the log as JSON lines; a resumed run continues the log from the step of its checkpoint."""

    def __init__(self, output: Path) -> None:
        """Write `output/log.jsonl`."""
        self._path = output / LOG_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # its last evaluation is repeated
            state.log_history = [entry for entry in state.log_history if not _is_evaluation(entry, state.max_steps)]
        if state.is_world_process_zero:
            self._write("w", state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            self._write("a", state.log_history[-1:])

    def _write(self, mode: str, entries: list[dict[str, Any]]) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise CheckpointError(
                f"{self._path} can't be written: {error.strerror}; make room, then go on with --resume"
            ) from error


def _is_evaluation(entry: dict[str, Any], step: int) -> bool:
    return entry.get("step") == step and any(name.startswith("eval_") for name in entry)


class InterruptCallback(TrainerCallback):
    """Ctrl-C or SIGTERM saves a checkpoint and ends the run; a second signal ends the run at once."""

    def __init__(self, trainer: "Trainer") -> None:
        """Handle the signals during a trainer's run."""
        self._trainer = trainer
        self._previous: dict[int, Any] = {}
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # processes get the signal at different steps and must agree on one
            count = torch.tensor(float(self.interrupted), device=args.device)
            self.interrupted = bool(self._trainer.accelerator.reduce(count, reduction="sum"))
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the signal handlers that were installed before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self.restore()
