"""A real HTTP server on this machine whose answers a test writes: whole ones, streams, errors, and streams cut off."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Script:
    """One answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Any = None
    """JSON of a whole answer; None: a stream."""
    chunks: tuple[Any, ...] = ()
    """A stream's chunks, as JSON; a text is sent as it is."""
    delay: float = 0.0
    """Seconds before each chunk."""
    cut: bool = False
    """Close the connection after the last chunk, in the middle of the answer."""


@dataclass
class Served:
    """What a test knows of its server."""

    url: str
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path, body and headers of each POST."""


Answer = Callable[[str, dict[str, Any], int], Script]
"""The script for a path, a body, and the number of the request."""


@contextmanager
def serve(answer: Answer, *, models: Script, folder: Path | None = None) -> Iterator[Served]:
    """A server until the `with` block ends.

    Args:
        answer: Gives the answer of each POST.
        models: The answer of /v1/models.
        folder: Files that are served at /, with the server's policy.
    """
    lock = threading.Lock()
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = None if folder is None else folder / (path.lstrip("/") or "index.html")
            if path == "/v1/models":
                self.play(models)
            elif file is not None and file.is_file():
                headers = {"Content-Type": TYPES[file.suffix], "Content-Security-Policy": POLICY}
                self.whole(200, headers, file.read_bytes())
            else:
                self.play(Script(status=404, content={"error": {"message": f"no {path} here"}}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
            self.play(answer(self.path, body, number))

        def play(self, script: Script) -> None:
            if script.content is not None:
                headers = {"Content-Type": "application/json", **script.headers}
                self.whole(script.status, headers, json.dumps(script.content).encode())
                return
            self.send_response(script.status)
            for name, value in {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in script.chunks:
                    time.sleep(script.delay)
                    text = chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                    data = text.encode()
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                if script.cut:  # a reset, once what was sent has been read
                    time.sleep(0.2)
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:  # the client has gone
                self.close_connection = True

        def whole(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def finish(self) -> None:
            with suppress(OSError):
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a reset connection isn't news
    served = Served(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for connection in connections:  # those that are kept open would still be answered
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
