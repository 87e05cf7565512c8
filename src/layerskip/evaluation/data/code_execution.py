"""pass@1 of HumanEval: generated code is run against its tests, in a process of its own.

This file is also that process's program: it imports nothing but the standard library when it is loaded, as `python -I`
doesn't find the package.

What runs there has none of our environment, an empty temporary folder, no standard input, limits of time, memory, file
sizes and processes, and dies with all it started when the time is up. It has no network: where the system lets users
make namespaces it has none at all, and everywhere an audit hook refuses connections, other processes, signals, and
changes to files outside its folder.

That guards against accidents: code of a language model that loops, fills the memory or deletes a file. It is no
sandbox: code that means harm can get around an audit hook. Measure models that you don't trust in a container.
"""

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function's body has ended, as in the paper of HumanEval (arXiv:2107.03374)."""
MIN_MEMORY = 2**27
"""Bytes of address space that the interpreter itself needs, with some room."""
MAX_FILE_BYTES = 2**20
MAX_ERROR = 300
"""Most characters of an error's message."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that the process knows of ours. With no threads allowed, NumPy would otherwise fail when it is imported."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

# Audit events (docs.python.org/3/library/audit_events.html).
PROCESS_EVENTS = frozenset(
    "os.exec os.fork os.forkpty os.kill os.killpg os.posix_spawn os.spawn os.system pty.spawn "
    "signal.pthread_kill subprocess.Popen".split()
)
CHANGE_EVENTS = frozenset(
    "os.chflags os.chmod os.chown os.link os.lockf os.mkdir os.remove os.removexattr os.rename os.rmdir os.setxattr "
    "os.symlink os.truncate os.utime shutil.move shutil.rmtree".split()
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What came of running a completion."""

    passed: bool
    """All tests ran to their end."""
    error: str | None
    """Why not, in a line."""
    seconds: float
    """How long it took, with the start of the interpreter."""


def truncate_completion(completion: str, stops: Sequence[str] = STOP_SEQUENCES) -> str:
    """What of a text belongs to the function: up to the first of the stop sequences.

    Args:
        completion: What a model wrote after a prompt.
        stops: Texts at which it ends; they aren't part of the result.
    """
    for stop in stops:
        completion = completion.partition(stop)[0]
    return completion


def check_completion(
    prompt: str,
    completion: str,
    test: str,
    entry_point: str,
    *,
    timeout_s: float = 10.0,
    memory_bytes: int = 2**30,
) -> Execution:
    """Run a completion against its tests, away from this process; the module's text says what that keeps from it.

    Args:
        prompt: Signature and docstring, as in HumanEval.
        completion: The body; see `truncate_completion`.
        test: Code that defines `check(candidate)`.
        entry_point: Name of the function to test.
        timeout_s: Seconds until it is killed.
        memory_bytes: Address space it may have.

    Returns:
        Whether it passed. A program that ends before its tests do, in whatever way, hasn't.

    Raises:
        InvalidArgumentError: A time, memory or name that can't be used, or a system without POSIX processes.
    """
    _check_limits(entry_point, timeout_s, memory_bytes)
    program = f"{prompt}{completion}\n\n{test}\n\ncheck({entry_point})\n"
    nonce = secrets.token_hex(16)
    order = {"program": program, "nonce": nonce, "seconds": timeout_s, "memory": memory_bytes}
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="layerskip-", ignore_cleanup_errors=True) as folder:
            code = _run_process({**order, "report": writing}, Path(folder), writing, timeout_s)
        seconds = time.perf_counter() - start
        os.close(writing)
        writing = -1
        error = _read_report(reading, nonce, code, timeout_s)
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    return Execution(passed=error is None, error=error, seconds=seconds)


def pass_at_1(executions: Sequence[Execution]) -> float:
    """Share of completions that passed, one for each problem.

    Raises:
        InvalidArgumentError: There are none.
    """
    if not executions:
        from layerskip.errors import InvalidArgumentError

        raise InvalidArgumentError("pass@1 needs at least one execution")
    return sum(execution.passed for execution in executions) / len(executions)


def _check_limits(entry_point: str, timeout_s: float, memory_bytes: int) -> None:
    from layerskip.errors import InvalidArgumentError

    if os.name != "posix":
        raise InvalidArgumentError(f"code is run on POSIX systems only (Linux, macOS), and this one is {os.name}")
    if not entry_point.isidentifier():
        raise InvalidArgumentError(f"entry_point must be the name of a function, got {entry_point!r}")
    if not 0 < timeout_s < 86_400:
        raise InvalidArgumentError(f"timeout_s must be more than 0 and less than a day, got {timeout_s}")
    if memory_bytes < MIN_MEMORY:
        raise InvalidArgumentError(f"memory_bytes must be at least {MIN_MEMORY}, got {memory_bytes}")


def _run_process(order: dict[str, Any], folder: Path, report: int, timeout_s: float) -> int | None:
    """The exit code of the process, negative for a signal; None if the time was up. All it started is dead then."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=ENVIRONMENT,
        pass_fds=(report,),
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(order).encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also what it left behind: the group is there as long as anyone is in it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
    return process.returncode


def _read_report(reading: int, nonce: str, code: int | None, timeout_s: float) -> str | None:
    """The error that the process reported, or why it reported none; None if the tests passed."""
    try:
        lines = os.read(reading, 2**16).splitlines()
    except BlockingIOError:  # something got away that holds the other end
        lines = []
    for line in lines:  # what was run may have written there as well
        with suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict) and report.get("nonce") == nonce:
                return None if report["error"] is None else str(report["error"])
    if code is None:
        return f"timed out after {timeout_s:g} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended before its tests did, with exit code {code}"


def _main() -> None:
    """Do what standard input says, report, and leave without a trace."""
    order = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    own = os.getpid()
    _leave_network()
    _set_limits(order["seconds"], order["memory"])
    _install_guard(os.getcwd())
    error = _run_program(order["program"])
    if os.getpid() == own:  # not in a process that the program made
        report = json.dumps({"nonce": order["nonce"], "error": error})
        os.write(order["report"], f"\n{report}\n".encode())
    os._exit(0)  # without the program's exit handlers and threads


def _run_program(program: str) -> str | None:
    """Run code as a module of its own; its error in a line, if there is one."""
    module = ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        kind = type(error).__name__
        try:
            message = " ".join(str(error)[:MAX_ERROR].split())
        except BaseException:
            message = ""
        return f"{kind}: {message}" if message else kind
    return None


def _leave_network() -> bool:
    """Move into a network namespace that has no network; False where the system doesn't let us."""
    try:
        return bool(ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)
    except (OSError, AttributeError):  # not Linux
        return False


def _set_limits(seconds: float, memory_bytes: int) -> None:
    """Limit what this process may use; what the system doesn't know isn't limited."""
    import resource

    wanted = {
        "RLIMIT_CPU": int(seconds) + 2,  # in case nobody is there to kill it when the time is up
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # no further processes or threads; doesn't hold for root
    }
    for name, limit in wanted.items():
        with suppress(AttributeError, ValueError, OSError):
            kind = getattr(resource, name)
            _, most = resource.getrlimit(kind)
            limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
            resource.setrlimit(kind, (limit, limit))


def _install_guard(folder: str) -> None:
    """Refuse connections, processes, signals, and changes to files outside a folder, for good."""
    home = os.path.realpath(folder)

    def refuse_outside(paths: Sequence[object]) -> None:
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.realpath(os.fsdecode(path))
                if place not in (home, os.devnull) and not place.startswith(home + os.sep):
                    raise PermissionError(f"{place} is outside the folder of this program")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING:
                refuse_outside(arguments[:1])
        elif event in PROCESS_EVENTS:
            raise PermissionError(f"{event}: other processes are out of reach here")
        elif event in CHANGE_EVENTS:
            refuse_outside(arguments)
        elif event.startswith("socket.") and event != "socket.__new__":  # asyncio makes one, and sends nothing
            raise PermissionError(f"{event}: there is no network here")

    sys.addaudithook(guard)


if __name__ == "__main__":
    _main()
