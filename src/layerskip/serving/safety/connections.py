"""Connections that are closed when a request's head doesn't come, is too long, or when there are too many of them."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from layerskip.serving.config import RequestLimits
from layerskip.serving.protocol.errors import busy

MOST_HEAD_BYTES = 65_536
"""Bytes of a request's line and headers."""


def limited_connections(limits: RequestLimits) -> type[HttpToolsProtocol]:
    """A connection class with these limits, as uvicorn makes one for each connection."""

    class LimitedConnection(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer: asyncio.TimerHandle | None = None
            self._head_bytes = 0
            if len(self.connections) > limits.connections:
                error = busy(f"more than {limits.connections} connections are open; try again later", "too_many")
                _answer(transport, 503, "Service Unavailable", json.dumps(error.body))
                return
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            between = self._head_timer is None and (self.cycle is None or self.cycle.response_complete)
            if between:
                self._await_head()
            if self._head_timer is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head_timer is not None and self._head_bytes > MOST_HEAD_BYTES:
                _answer(self.transport, 431, "Request Header Fields Too Large", "")

        def on_headers_complete(self) -> None:
            self._stop_timer()
            super().on_headers_complete()

        def _await_head(self) -> None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(limits.header_seconds, self._give_up)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                _answer(self.transport, 408, "Request Timeout", "")

    return LimitedConnection


def _answer(transport: asyncio.Transport, status: int, phrase: str, body: str) -> None:
    """Answer outside of any request, and close."""
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    retry = "retry-after: 1\r\n" if status == 503 else ""
    transport.write(f"{head}{retry}content-length: {len(body)}\r\n\r\n{body}".encode())
    transport.close()
