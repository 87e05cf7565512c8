"""pass@1 of HumanEval: runs generated code against its tests, in a process of its own.

This file is also the program of that process, so it imports nothing but the standard library when it is loaded: `python
-I` doesn't find the package.

The process has none of our environment, an empty temporary folder, no standard input, and limits of time, memory, file
sizes and processes. It is killed with everything that it started when the time is up. It has no network: if the system
lets users make namespaces, there is no network at all; on all systems an audit hook refuses connections, other
processes, signals, and changes to files outside its folder.

These limits guard against accidents: generated code that loops, fills the memory or deletes a file. They are no
sandbox: malicious code can get around an audit hook. Measure models that you don't trust in a container.
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
"""Texts that end a function's body, as in the paper of HumanEval (arXiv:2107.03374)."""
MIN_MEMORY = 2**27
"""Bytes of address space that the interpreter itself needs, with a margin."""
MAX_FILE_BYTES = 2**20
MAX_ERROR = 300
"""Characters of an error's message, at most."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The environment of the process. Since it may not start threads, NumPy would otherwise fail when it is imported."""
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
    """Result of running a completion."""

    passed: bool
    """Whether all tests ran to their end."""
    error: str | None
    """The reason of a failure, in one line."""
    seconds: float
    """Seconds of the run, with the start of the interpreter."""


def truncate_completion(completion: str, stops: Sequence[str] = STOP_SEQUENCES) -> str:
    """The part of a text that belongs to the function, up to the first stop sequence.

    Args:
        completion: Text that a model generated after a prompt.
        stops: Stop sequences, which aren't part of the result.
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
    """Run a completion against its tests in a process of its own, with the limits that the module's docstring names.

    Args:
        prompt: Signature and docstring, as in HumanEval.
        completion: The body; see `truncate_completion`.
        test: Code that defines `check(candidate)`.
        entry_point: Name of the function to test.
        timeout_s: Seconds until the process is killed.
        memory_bytes: Bytes of address space that the process may use.

    Returns:
        The result. A program that ends before its tests do, in whatever way, has not passed.

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
    """Share of completions that passed, with one completion for each problem.

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
    """The process's exit code, negative for a signal; None if the time was up. Everything that it started is killed."""
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
        # Also kills processes that it left behind: the group exists as long as it has a member.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
    return process.returncode


def _read_report(reading: int, nonce: str, code: int | None, timeout_s: float) -> str | None:
    """The error that the process reported, or the reason that it reported none; None if the tests passed."""
    try:
        lines = os.read(reading, 2**16).splitlines()
    except BlockingIOError:  # a process has escaped and keeps the other end open
        lines = []
    for line in lines:  # the program may have written to this pipe too
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
    """Run the program from standard input, report the result, and exit at once."""
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
    """Run code as a module; returns its error in one line, or None."""
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
    """Move into a network namespace without a network; False if the system doesn't allow it."""
    try:
        return bool(ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)
    except (OSError, AttributeError):  # not Linux
        return False


def _set_limits(seconds: float, memory_bytes: int) -> None:
    """Limit the resources of this process, as far as the system supports it."""
    import resource

    wanted = {
        "RLIMIT_CPU": int(seconds) + 2,  # in case the parent isn't there to kill it when the time is up
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
    """Refuse connections, processes, signals, and changes to files outside a folder, irrevocably."""
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
        elif event.startswith("socket.") and event != "socket.__new__":  # asyncio makes one and sends nothing
            raise PermissionError(f"{event}: there is no network here")

    sys.addaudithook(guard)


if __name__ == "__main__":
    _main()
