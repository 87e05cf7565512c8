"""The command line's entry: finds the command, runs it, and turns every failure into one line and an exit code.

A command is one line in `COMMANDS` and a module of its name in `layerskip.cli` or `layerskip.cli.measuring` (with an
underscore for a hyphen), or for subcommands a folder with a module `main`, which has

    def run(argv: Sequence[str]) -> int:
        arguments = parse(NameArguments, "NAME", argv)     # layerskip.cli.flags.arguments; answers --help by itself
        ...                                                # import what needs torch here, not at the top
        return ExitCode.DONE

and lets `LayerSkipError` and `KeyboardInterrupt` pass: `main` handles them. `exit_code.ExitCode` has the codes.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.terminal.output import drop_output, prepare_streams, report_error
from layerskip.errors import InvalidArgumentError, LayerSkipError

COMMANDS = {
    "generate": "write after a prompt, and show what speculation does",
    "chat": "talk with a model that has a chat template",
    "verify": "prove that self-speculative decoding changes nothing",
    "serve": "serve a model by OpenAI's API",
    "batch": "write after every prompt of a file",
    "benchmark": "compare strategies on a data set: speed and quality",
    "bench-serve": "put load on a server, and measure throughput and latency",
    "sweep": "find the fastest exit layer and draft length",
    "eval": "run lm-eval's tasks, at any exit layer",
    "report": "turn finished runs into pages, and compare them",
    "train": "train a model whose early layers can predict",
    "inspect": "show what a checkpoint is and which exits it offers",
    "quantize": "save a checkpoint in fewer bits, and show what that changes",
    "export": "write a draft model and other forms for other engines",
    "info": "show what this installation has, and what it uses here",
    "demo": "see the embedded model draft and verify",
}
MEASURING = ("verify", "benchmark", "bench-serve", "sweep", "eval", "report", "inspect")
"""Commands whose modules are in `layerskip.cli.measuring`."""


def module_of(command: str) -> str:
    """Name of the module that runs a command."""
    if command == "export":  # a folder of subcommands
        return "layerskip.cli.export.main"
    return f"layerskip.cli.{'measuring.' if command in MEASURING else ''}{command.replace('-', '_')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: What follows the program's name; that of the process if not given.

    Returns:
        The exit code.
    """
    prepare_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with ranks_of(given):
            code = _dispatch(given)
            sys.stdout.flush()
    except LayerSkipError as error:
        report_error(str(error))
        return ExitCode.FAILED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        drop_output()
        return ExitCode.PIPE_CLOSED
    except OSError as error:  # of the output, such as a full disk; others have become errors of their own
        drop_output()
        report_error(f"{error.filename or 'the output'} can't be written: {error.strerror or error}")
        return ExitCode.FAILED
    return code


@contextmanager
def ranks_of(argv: Sequence[str]) -> Iterator[None]:
    """Run a command together with other processes, if it was started so or asks for them."""
    from layerskip.cli.ranks.launch import asked_for, others_running
    from layerskip.cli.ranks.place import COMMANDS as PARALLEL
    from layerskip.cli.ranks.place import place

    if not argv or argv[0] not in PARALLEL or not {"-h", "--help"}.isdisjoint(argv):
        yield
        return
    num_ranks = asked_for(argv) if place() is None else 1
    with others_running(argv, num_ranks) if num_ranks > 1 else nullcontext():
        if place() is None:
            yield
            return

        from layerskip.cli.ranks.session import join

        session = join()
        assert session is not None
        try:
            yield
        except BaseException as error:
            session.failed(error)
            raise
        else:
            session.close()


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return ExitCode.DONE
    if argv[0] in ("-V", "--version"):
        from layerskip.machine import __version__

        print(f"layerskip {__version__}")
        return ExitCode.DONE
    command, *rest = argv
    if command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        raise InvalidArgumentError(f"unknown {kind} {command!r}; use {', '.join(COMMANDS)}, --help or --version")
    try:
        code: int = import_module(module_of(command)).run(rest)
    except SystemExit as stop:  # tyro has answered --help
        code = stop.code if isinstance(stop.code, int) else ExitCode.DONE
    return code


def _overview() -> str:
    width = max(map(len, [*COMMANDS, "--version"]))
    return "\n".join(
        [
            "usage: layerskip COMMAND [OPTIONS]",
            "",
            "Train models whose early layers can predict, and decode with them: those draft, the others verify.",
            "",
            "commands:",
            *(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "options:",
            f"  {'--help':{width}}  show this, or after a command its options",
            f"  {'--version':{width}}  show the version",
            "",
            'example: layerskip generate --prompt "def add(a, b):" --exit-layer 4',
        ]
    )
