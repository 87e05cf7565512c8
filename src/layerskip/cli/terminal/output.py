"""Standard streams in whatever state a shell leaves them: closed, full, or in an encoding that lacks characters."""

import os
import sys
from contextlib import suppress


def prepare_streams() -> None:
    """Make every stream one that can be written to.

    A stream that was closed goes nowhere, like /dev/null: a run that keeps its results in files needs none, and a file
    that is opened must not get the number of a closed stream. Characters that a stream's encoding doesn't have are
    written as backslash escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def report_error(message: str) -> None:
    """One line on standard error, if it can be written."""
    with suppress(OSError, ValueError):
        print(f"layerskip: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere: Python would try once more when it ends."""
    with suppress(OSError, ValueError):  # a stream of a test has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
