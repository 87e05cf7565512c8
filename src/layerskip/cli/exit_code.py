"""What the program returns to the shell."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of all commands."""

    DONE = 0
    CHECK_FAILED = 1
    """The command ran, and found what it looks for: texts that differ, errors."""
    FAILED = 2
    """The command couldn't run: a bad command line, model, prompt, ..."""
    INTERRUPTED = 130
    """Ctrl-C; 128 + SIGINT."""
    PIPE_CLOSED = 141
    """Whoever read the output has gone; 128 + SIGPIPE."""
