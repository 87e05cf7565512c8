"""The server's process: its socket, its signals, and its end."""

import asyncio
import resource
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from layerskip.errors import InvalidArgumentError
from layerskip.serving.config import ServerConfig
from layerskip.serving.safety.connections import limited_connections
from layerskip.serving.service import Service

SWITCH_SECONDS = 0.0005
"""Seconds that a thread may keep Python's lock while another one waits. By default it is 5 ms: several rounds of a
small model, for which the engine would wait whenever an answer is being written."""
BACKLOG = 2048
LAST_SECONDS = 5
"""Seconds that connections have to close once everything is answered."""


def bind(config: ServerConfig) -> socket.socket:
    """The socket to listen at, bound before anything takes long.

    Raises:
        InvalidArgumentError: The port is in use, or the address isn't this machine's.
    """
    try:
        found = socket.getaddrinfo(config.host.strip("[]"), config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise InvalidArgumentError(
            f"can't listen at {config.host}:{config.port}: {error.strerror or error}; give another --host or --port"
        ) from error
    return made


def run(app: FastAPI, config: ServerConfig, listening: socket.socket, started: Callable[[str], None]) -> None:
    """Serve until a signal ends it.

    Args:
        app: From `create_app`.
        config: The same as the app's.
        listening: From `bind`.
        started: Called with the address once requests are taken.
    """
    _raise_file_limit()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        settings = uvicorn.Config(
            app,
            http=limited_connections(config.limits),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        _Server(settings, app.state.service, config.drain_timeout, started).run([listening])
    finally:
        sys.setswitchinterval(interval)


class _Server(uvicorn.Server):
    """A server that finishes what it has begun when it is asked to stop."""

    def __init__(
        self, settings: uvicorn.Config, service: Service, drain_timeout: float, started: Callable[[str], None]
    ) -> None:
        super().__init__(settings)
        self._service, self._drain_timeout, self._on_start = service, drain_timeout, started
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal: no new requests, those that run may end. The second one: the end."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_timeout
            self._service.scheduler.drain()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            scheduler = self._service.scheduler
            if scheduler.num_tickets == 0 or time.monotonic() > self._deadline:
                await asyncio.to_thread(scheduler.stop)
                self.should_exit = True
        return await super().on_tick(counter)


def _raise_file_limit() -> None:
    """Allow as many open connections as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
