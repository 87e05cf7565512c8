"""Progress bars for work of known length."""

import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerskip.cli.flags.arguments import OutputArguments
from layerskip.cli.terminal.terminal import is_terminal, make_console


def make_progress(output: OutputArguments, *, silent: bool = False) -> Progress:
    """A progress bar on standard error; silent on demand, and where that isn't a terminal."""
    console = make_console(output, stderr=True)
    # Some versions of rich end even a disabled bar with an empty line.
    console.quiet = silent or not is_terminal(sys.stderr)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet,
    )
