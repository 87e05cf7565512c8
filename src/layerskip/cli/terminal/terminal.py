"""The terminal: whether there is one, its colours, progress, and a prompt line with history."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from layerskip.cli.flags.arguments import ModelArguments, NamedModel, OutputArguments
from layerskip.cli.ranks.session import joined
from layerskip.errors import TokenizerError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from layerskip.checkpoint.checkpoint import Checkpoint
    from layerskip.checkpoint.known_file import Report
    from layerskip.language_model import LanguageModel

HISTORY_LENGTH = 1000
BAR_AFTER = 2.0
"""Seconds of work on files before it gets a bar."""
NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell what they couldn't use, or whom they don't like, when transformers loads a model."""


def is_terminal(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def draws(output: OutputArguments) -> bool:
    """Whether standard output gets colours, drafts and tables, and not plain text or JSON."""
    return is_terminal(sys.stdout) and not output.json


def make_console(output: OutputArguments, *, stderr: bool = False) -> "Console":
    """A console for tables and coloured text that shows texts as they are; `NO_COLOR` is respected."""
    from rich.console import Console

    no_color = True if output.no_color else None
    return Console(stderr=stderr, no_color=no_color, highlight=False, markup=False, emoji=False)


def progress(output: OutputArguments, message: str) -> AbstractContextManager[object]:
    """A line on standard error while something takes its time; nothing where that isn't a terminal, or for JSON."""
    if output.json or not is_terminal(sys.stderr):
        return nullcontext()
    return make_console(output, stderr=True).status(message)


@contextmanager
def late_bar(output: OutputArguments, message: str) -> Iterator["Report"]:
    """What work on files tells its progress to; shown as a bar, like `progress`, if it takes more than a moment."""
    visible, began, bar = not output.json and is_terminal(sys.stderr), monotonic(), None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if not visible or monotonic() - began < BAR_AFTER:
            return
        if bar is None:
            bar = _download_bar(output)
            bar.start()
            bar.add_task(message, total=total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _download_bar(output: OutputArguments) -> "Progress":
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=make_console(output, stderr=True),
        transient=True,
    )


def open_model(arguments: NamedModel, output: OutputArguments) -> "Checkpoint":
    """Find the checkpoint that the arguments name.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    from layerskip.checkpoint.checkpoint import open_checkpoint

    if output.verbose:
        tell_more()
    with late_bar(output, f"preparing {arguments.model}") as report:  # downloads show their own bars
        return open_checkpoint(arguments.model, revision=arguments.revision, report=report)


def load_model(arguments: ModelArguments, output: OutputArguments) -> "LanguageModel":
    """Load the model that the arguments name, with its tokenizer.

    Raises:
        LayerSkipError: As `layerskip.load`; a tokenizer that is missing is reported when it is first used.
    """
    with progress(output, "starting"):
        from layerskip.language_model import LanguageModel

        silence_libraries(bars=not output.json and is_terminal(sys.stderr))
    checkpoint = open_model(arguments, output)
    with progress(output, f"loading {arguments.model}"):
        model = LanguageModel.of(checkpoint, arguments)
        with suppress(TokenizerError):
            _ = model.text_tokenizer
    return model


def tell_more() -> None:
    """Let this package's own remarks through to standard error."""
    logger = logging.getLogger("layerskip")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("layerskip: %(message)s"))
        logger.addHandler(handler)


def tell_left_out(output: OutputArguments, left_out: Sequence[Mapping[str, Any]], num_prompts: int) -> None:
    """Say on standard error which prompts a measurement left out, if any."""
    if left_out:
        from layerskip.evaluation.left_out import describe_left_out

        console = make_console(output, stderr=True)
        console.print(f"note: {describe_left_out(left_out, num_prompts)}", soft_wrap=True)


def silence_libraries(*, bars: bool) -> None:
    """Keep other libraries' remarks and progress bars off the terminal, but for downloads if `bars`.

    Importing them takes seconds. What isn't imported yet, and may never be, is told by the environment.
    """
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not bars and "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    elif not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def line_history(name: str) -> Iterator[None]:
    """Arrow keys and a history at `input`, kept in the user's state folder where that can be written.

    Args:
        name: Names the history's file.
    """
    session = joined()
    if session is not None and not session.place.leads:
        yield
        return
    try:
        import readline
    except ImportError:  # not on every platform; `input` works without
        yield
        return
    file = _state_folder() / f"{name}_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LENGTH)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def read_line(prompt: str) -> str | None:
    """One line from the user; None at the end of input (Ctrl-D), an empty line after Ctrl-C."""
    session = joined()
    if session is None:
        return _ask(prompt)

    def ask() -> bytes | None:
        line = _ask(prompt)
        return None if line is None else line.encode("utf-8", "surrogatepass")

    content = session.everywhere(ask)
    return None if content is None else content.decode("utf-8", "surrogatepass")


def _ask(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("  (/quit or Ctrl-D ends)")
        return ""


def take_command(line: str, commands: Sequence[str]) -> tuple[str | None, str]:
    """What a line at the prompt is: one of the commands, or a message.

    A message may begin with a slash. If it is the name of a command, it is written with two, of which one stays.

    Args:
        line: What the user typed.
        commands: Their names, with the slash.

    Returns:
        The command or None, and the message.
    """
    command = line.strip()
    if command in commands:
        return command, ""
    return None, line[1:] if line.startswith("//") else line


def _state_folder() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    home = Path(os.environ.get("HOME") or "~").expanduser()
    return (Path(given) if Path(given).is_absolute() else home / ".local" / "state") / "layerskip"
