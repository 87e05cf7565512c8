"""`layerskip serve` and llama.cpp's server in processes of their own, for benchmarks, and what their processes hold."""

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[1] / "src"
START_SECONDS = 180
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """A server that runs."""

    address: str
    process: "subprocess.Popen[str]"
    log: Path
    facts: dict[str, Any]
    """What it said at its start."""

    @property
    def resident_bytes(self) -> int:
        """Memory that its process has at present."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None, "the process has ended"
        return 1024 * int(found[1])

    @property
    def num_files(self) -> int:
        """Files and sockets that its process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def num_threads(self) -> int:
        """Threads of its process."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def metric(self, name: str) -> float:
        """The value of a gauge or counter, added up over its labels."""
        with DIRECT.open(f"{self.address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"layerskip:{name}[ {{]", line)]
        assert found, f"there is no metric {name}"
        return sum(found)


@contextmanager
def layerskip_server(model: str, log: Path, *flags: str, threads: int) -> Iterator[ServerProcess]:
    """`layerskip serve` at a free port; ended with the block.

    Args:
        model: Its model.
        log: File for its log.
        flags: Further flags.
        threads: Threads that compute.
    """
    command = [sys.executable, "-m", "layerskip", "serve", model, "--port", "0", "--json", *flags]
    with started(command, log, threads) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            raise SystemExit(f"the server has not started: {log.read_text()[-2000:]}")
        facts = json.loads(line)
        yield ServerProcess(address=facts["address"], process=process, log=log, facts=facts)


@contextmanager
def llama_cpp_server(file: Path, log: Path, *, context: int, threads: int) -> Iterator[ServerProcess]:
    """llama-cpp-python's server with one GGUF file at a free port; ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"model": file, "port": port, "n_ctx": context, "n_threads": threads, "n_threads_batch": threads}
    command = [sys.executable, "-m", "llama_cpp.server", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    with started([*command, "--verbose", "false"], log, threads) as process:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not _answers(f"{address}/v1/models"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"llama.cpp's server has not started: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield ServerProcess(address=address, process=process, log=log, facts={})


@contextmanager
def started(command: Sequence[str], log: Path, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """A process, killed with the block."""
    path = os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
