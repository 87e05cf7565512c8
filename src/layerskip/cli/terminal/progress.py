"""Progress bars for work of known length."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from layerskip.cli.flags.arguments import OutputArguments
from layerskip.cli.terminal.terminal import is_terminal, make_console

if TYPE_CHECKING:
    from layerskip.evaluation.progress import Progress


def make_progress(output: OutputArguments, *, silent: bool = False) -> Bar:
    """A progress bar on standard error; silent on demand, and where that isn't a terminal."""
    console = make_console(output, stderr=True)
    # Some versions of rich end even a disabled bar with an empty line.
    console.quiet = silent or not is_terminal(sys.stderr)
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet,
    )


@contextmanager
def show_progress(output: OutputArguments, what: str) -> Iterator["Progress"]:
    """What a measurement tells its progress to; shown as a bar, which first says `what`."""
    with make_progress(output) as bar:
        task = bar.add_task(what, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
