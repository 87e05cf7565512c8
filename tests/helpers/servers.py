"""Servers for tests: `layerskip serve` in a process of its own, or the app in a thread of this one."""

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from layerskip import LanguageModel

SRC = Path(__file__).resolve().parents[2] / "src"
START_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that runs."""

    address: str
    process: "subprocess.Popen[str]"
    facts: dict[str, object]
    """What it said at its start."""
    log_file: Path

    @property
    def log(self) -> str:
        """Its log so far."""
        return self.log_file.read_text()

    def client(self, **options: object) -> httpx.Client:
        """A client without OpenAI's ways."""
        return httpx.Client(base_url=self.address, timeout=60, verify=False, **options)  # type: ignore[arg-type]

    def wait(self, seconds: float = 30) -> int:
        """The exit code, once the process has ended."""
        return self.process.wait(seconds)


def start_server(folder: Path, model: str, *flags: str) -> Served:
    """Start a server at a free port, and wait until it takes requests."""
    log_file = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "layerskip", "serve", model, "--port", "0", "--json", *flags]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        raise AssertionError(f"no server: {log_file.read_text()}")
    facts = json.loads(line)
    return Served(address=facts["address"], process=process, facts=facts, log_file=log_file)


@contextmanager
def serving(folder: Path, model: str, *flags: str) -> Iterator[Served]:
    """A server that is ended with the block."""
    server = start_server(folder, model, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def events(lines: Sequence[str] | Iterator[str]) -> list[dict[str, object]]:
    """The JSON of a stream's events; the last one must be [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(each) for each in data[:-1]]


@contextmanager
def app_at_port(lm: LanguageModel, **settings: Any) -> Iterator[str]:
    """The app at a free port, in a thread of this process; gives its address.

    Args:
        lm: The model.
        **settings: Fields of `ServerConfig`.
    """
    import uvicorn

    from layerskip.serving.app import create_app
    from layerskip.serving.config import ServerConfig

    app = create_app(lm, ServerConfig(**settings))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server has ended at its start"
            time.sleep(0.02)
        host, port = listening.getsockname()
        yield f"http://{host}:{port}"
        server.should_exit = True
        thread.join(30)
