"""What is shown while a model is trained: a bar with loss, tokens a second and time left; what is being prepared."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from layerskip.cli.flags.arguments import OutputArguments
from layerskip.cli.terminal.progress import make_progress

if TYPE_CHECKING:
    from rich.progress import TaskID

    from layerskip.training.callbacks import StepReport

SECONDS_BETWEEN_LINES = 30.0
"""Between lines where there is no terminal, as in a log file."""


class TrainingProgress:
    """A bar on a terminal, a line now and then in a log file, nothing with JSON."""

    def __init__(self, output: OutputArguments) -> None:
        """Draw on standard error."""
        self._silent = output.json
        self._bar = make_progress(output, silent=output.json)
        self._draws = not self._bar.disable
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> "TrainingProgress":
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal clean."""
        self._bar.stop()

    def message(self, text: str) -> None:
        """Say what is being done."""
        if self._draws:
            self._bar.console.print(text)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def step(self, report: "StepReport") -> None:
        """Show a step."""
        loss = "" if report.loss is None else f"loss {report.loss:.3f}, "
        text = f"{loss}{report.tokens_per_second:.0f} tokens/s"
        if self._draws:
            if self._task is None:
                self._task = self._bar.add_task("", total=report.num_steps)
            self._bar.update(self._task, completed=report.step, description=text)
        elif not self._silent and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"step {report.step} of {report.num_steps}, {text}", file=sys.stderr, flush=True)
