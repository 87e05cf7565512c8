"""`--tensor-parallel N` without torchrun: this process becomes rank 0, and starts the others."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from layerskip.cli.ranks.place import FOLDER, place
from layerskip.cores import find_cores
from layerskip.errors import InvalidArgumentError

FLAG = "--tensor-parallel"
MOST_RANKS = 64
"""Processes: more than anyone has GPUs in a machine."""
END_SECONDS = 20.0
"""Seconds that the other ranks get to end by themselves."""


def asked_for(argv: Sequence[str]) -> int:
    """Ranks that a command line asks for; 1 if it doesn't, or if the value is one that parsing will refuse."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, own = flag.replace("_", "-").partition("=")
        if name == FLAG:
            given = own if equals else value
            return int(given) if given.isascii() and given.isdigit() else 1
    return 1


@contextmanager
def others_running(command: Sequence[str], num_ranks: int) -> Iterator[None]:
    """Run a command line in the other ranks too, as long as this one runs it.

    Args:
        command: Command and flags.
        num_ranks: N.

    Raises:
        InvalidArgumentError: More ranks than make sense.
    """
    if num_ranks > MOST_RANKS:
        raise InvalidArgumentError(f"tensor_parallel must be at most {MOST_RANKS} on one machine, got {num_ranks}")
    folder = tempfile.mkdtemp(prefix="layerskip-ranks-")
    threads = str(max(1, find_cores().usable // num_ranks))
    shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), FOLDER: folder}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    os.environ.update({**shared, "RANK": "0", "LOCAL_RANK": "0"})
    place.cache_clear()
    processes = [
        _start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(1, num_ranks)
    ]
    try:
        yield
    finally:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank; in a session of its own, so that Ctrl-C is for the process that the user talks to."""
    return subprocess.Popen(
        [sys.executable, "-m", "layerskip", *command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
