"""Generated code passes only if its tests ran to their end, and leaves nothing behind."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.code_execution import (
    Execution,
    check_completion,
    pass_at_1,
    truncate_completion,
)

SRC = Path(__file__).parents[4] / "src"
PROMPT = 'def add(a, b):\n    """Sum of two numbers."""\n'
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
RIGHT = "    return a + b\n"


def run(body: str, *, timeout_s: float = 20.0, memory_bytes: int = 2**30) -> Execution:
    return check_completion(PROMPT, body, TEST, "add", timeout_s=timeout_s, memory_bytes=memory_bytes)


def error_of(body: str) -> str:
    execution = run(body)
    assert not execution.passed
    assert execution.error is not None
    return execution.error


def test_a_right_solution_passes() -> None:
    execution = run(RIGHT)
    assert execution == Execution(passed=True, error=None, seconds=execution.seconds)
    assert 0 < execution.seconds < 20


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("    return a - b\n", "AssertionError"),
        ("    return a + c\n", "NameError: name 'c' is not defined"),
        ("    return a +\n", "SyntaxError"),
        ("    return add(a, b)\n", "RecursionError"),
        ("    import sys\n    sys.exit(0)\n", "SystemExit: 0"),
        ("    import os\n    os._exit(0)\n", "ended before its tests did, with exit code 0"),
        ("    import os\n    os.abort()\n", "killed by SIGABRT"),
        ("    raise KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("    class Bad(Exception):\n        def __str__(self): return 1 / 0\n    raise Bad\n", "Bad"),
        ("    return a + b\n\nimport sys\nsys.exit(0)\n", "SystemExit"),
        ("    return [0] * 10**12\n", "MemoryError"),
    ],
)
def test_what_does_not_reach_the_end_of_the_tests_fails(body: str, error: str) -> None:
    assert error_of(body).startswith(error)


def test_memory_that_grows_is_limited() -> None:
    hog = "    kept = []\n    while True:\n        kept.append(bytearray(2**22))\n"
    execution = run(hog, memory_bytes=2**28)
    assert (execution.passed, execution.error) == (False, "MemoryError")


@pytest.mark.parametrize(
    "body",
    [
        "    while True:\n        pass\n",
        "    import time\n    while True:\n        try:\n            time.sleep(9)\n"
        "        except BaseException:\n            pass\n",
    ],
)
def test_an_endless_loop_ends_when_the_time_is_up(body: str) -> None:
    start = time.perf_counter()
    execution = run(body, timeout_s=1.0)
    assert (execution.passed, execution.error) == (False, "timed out after 1 s")
    assert 1.0 <= execution.seconds <= time.perf_counter() - start < 10


def test_what_is_printed_or_written_to_any_descriptor_does_not_count() -> None:
    garbage = (
        "    import os\n    print('passed' * 100_000)\n"
        "    for number in range(1, 64):\n"
        "        for text in (b'\\n{\"nonce\": \"\", \"error\": null}\\n', b'[1]\\n{', b'\\xff\\xfe'):\n"
        "            try:\n                os.write(number, text)\n            except OSError:\n                pass\n"
    )
    assert run(garbage + RIGHT).passed
    assert not run(garbage + "    os._exit(0)\n").passed


def test_it_starts_in_an_empty_folder_without_our_environment_or_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "12345")
    looks = (
        "    import os, sys\n    assert os.listdir() == [], os.listdir()\n    assert 'SECRET_TOKEN' not in os.environ\n"
        "    assert sys.stdin.read() == ''\n    assert 'layerskip' not in sys.modules\n"
    )
    execution = run(looks + RIGHT)
    assert execution.error is None


def test_files_are_written_in_its_own_folder_only(tmp_path: Path) -> None:
    assert run("    open('notes', 'w').write('x')\n    import os\n    os.remove('notes')\n" + RIGHT).passed
    victim = tmp_path / "kept.txt"
    victim.write_text("kept")
    for attempt in (
        f"open({str(victim)!r}, 'w')",
        f"__import__('os').remove({str(victim)!r})",
        f"__import__('shutil').rmtree({str(tmp_path)!r})",
        f"__import__('os').rename({str(victim)!r}, 'mine')",
        f"__import__('pathlib').Path({str(tmp_path / 'new')!r}).mkdir()",
    ):
        assert "is outside the folder" in error_of(f"    {attempt}\n{RIGHT}"), attempt
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert victim.read_text() == "kept"
    assert "File too large" in error_of("    open('large', 'w').write('x' * 2**22)\n" + RIGHT)


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.system('true')",
        "subprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 9)",
        "os.killpg(0, 9)",
    ],
)
def test_other_processes_are_out_of_reach(attempt: str) -> None:
    assert "out of reach" in error_of(f"    import os, subprocess\n    {attempt}\n{RIGHT}")


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="looks for processes in /proc")
def test_a_process_that_got_past_the_guard_is_killed_and_reports_nothing() -> None:
    name = f"left{os.getpid()}"
    fork = (
        "    import ctypes, time\n    libc = ctypes.CDLL(None)\n    if libc.fork() == 0:\n"
        f"        libc.prctl(15, b'{name}', 0, 0, 0)\n        time.sleep(SECONDS)\n        return a + b\n"
        "    time.sleep(0.3)\n"
    )
    start = time.perf_counter()
    assert run(fork.replace("SECONDS", "60") + RIGHT).passed
    assert time.perf_counter() - start < 20
    while name in names_of_processes() and time.perf_counter() - start < 40:  # it is killed, and may not be gone yet
        time.sleep(0.05)
    assert name not in names_of_processes()
    # The fork finishes the tests, and the process itself does not.
    assert not run(fork.replace("SECONDS", "0") + "    return None\n").passed


def names_of_processes() -> set[str]:
    names = set()
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            state = (file.parent / "stat").read_text().rpartition(") ")[2][0]
            if state not in "ZX":  # dead, and not collected by its new parent yet
                names.add(file.read_text().strip())
        except OSError:
            continue
    return names


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port that waits for connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening


def nobody_called(listening: socket.socket) -> bool:
    try:
        listening.accept()[0].close()
    except TimeoutError:
        return True
    return False


def test_there_is_no_network(server: socket.socket) -> None:
    connect = f"    import socket\n    socket.create_connection({server.getsockname()!r}, 5)\n"
    assert "there is no network here" in error_of(connect + RIGHT)
    assert "no network" in error_of("    import urllib.request as u\n    u.urlopen('http://example.com')\n" + RIGHT)
    assert nobody_called(server)
    local = "    import asyncio\n    async def total():\n        return a + b\n    return asyncio.run(total())\n"
    assert run(local).passed


def call(code: str, folder: Path) -> str:
    """Standard output of a process that has the module's functions as `execution`."""
    header = "import socket\nimport layerskip.evaluation.data.code_execution as execution\n"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", header + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CONNECT = """
try:
    socket.create_connection({address}, 5)
except OSError as error:
    print(type(error).__name__, error)
else:
    print("connected")
"""


def test_the_audit_hook_alone_keeps_the_network_away(server: socket.socket, tmp_path: Path) -> None:
    connect = CONNECT.format(address=server.getsockname())
    assert call(connect, tmp_path) == "connected"
    assert not nobody_called(server)
    said = call("execution._install_guard('.')" + connect, tmp_path)
    assert said.startswith("PermissionError")
    assert nobody_called(server)


def test_the_namespace_alone_keeps_the_network_away(server: socket.socket, tmp_path: Path) -> None:
    said = call("print(execution._leave_network())" + CONNECT.format(address=server.getsockname()), tmp_path)
    if said.startswith("False"):
        pytest.skip("this system doesn't let users make namespaces")
    assert said.startswith("True\nOSError")
    assert nobody_called(server)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0.0}, "timeout_s must be more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be more than 0"),
        ({"memory_bytes": 1000}, "memory_bytes must be at least 134217728, got 1000"),
        ({"entry_point": "f(); g"}, "entry_point must be the name of a function"),
    ],
)
def test_bad_arguments(options: dict[str, float | int | str], message: str) -> None:
    arguments = {"entry_point": "add", **options}
    with pytest.raises(InvalidArgumentError, match=message):
        check_completion(PROMPT, RIGHT, TEST, **arguments)  # type: ignore[arg-type]


def test_the_smallest_memory_is_enough_for_python() -> None:
    assert run(RIGHT, memory_bytes=2**27).passed


@pytest.mark.parametrize("stop", ["\nclass A:", "\ndef g():", "\n# end", "\nif True:", "\nprint(1)"])
def test_completions_end_where_the_function_does(stop: str) -> None:
    body = "    # a comment\n    if a:\n        print(a)\n    def inner(): pass\n    return a"
    assert truncate_completion(body + stop + "\nclass B: pass\n") == body
    assert truncate_completion(body) == body
    assert truncate_completion("a<end>b", ["<end>"]) == "a"


def test_pass_at_1() -> None:
    right, wrong = Execution(passed=True, error=None, seconds=1.0), Execution(passed=False, error="x", seconds=1.0)
    assert pass_at_1([right, wrong, wrong, wrong]) == 0.25
    with pytest.raises(InvalidArgumentError, match="at least one"):
        pass_at_1([])
