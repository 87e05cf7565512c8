"""A small hub on this machine, and a user of it whose calls run in processes of their own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SRC = Path(__file__).parents[2] / "src"


@dataclass
class Repository:
    """A repository of models or data sets: revisions with their commits, and files of each commit."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    gated: bool = False
    """Nobody has access; as on the hub, its description is public and its files are not."""
    hidden: bool = False
    """With `gated`: not even the description is given."""
    broken: int = 0
    """Status of every answer, or -1 to hang up without one, where not 0."""


@dataclass
class Hub:
    """The stub's content and what it was asked."""

    url: str
    repositories: dict[str, Repository]
    """By name; those of data sets begin with `datasets/`."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, Authorization header."""

    def files_sent(self) -> set[str]:
        """Names of the files whose contents were sent."""
        found = (re.search(r"/resolve/[^/]+/(.+)", path) for method, path, _ in self.requests if method == "GET")
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that `snapshot_download` and `load_dataset` use."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        hub, path = self.server.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        api = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = hub.repositories.get(match[1].removeprefix("models/")) if match else None
        if match is None or repository is None:
            return self.refuse(404, "RepoNotFound")
        if repository.broken == -1:
            self.close_connection = True
            return None
        if repository.broken:
            return self.refuse(repository.broken, "")
        if repository.gated and (repository.hidden or file or match[2] == "tree"):
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        revision = (api[3] if api else match[2]) or "main"
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if api:
            return self.send(json.dumps(self.describe(api, commit, files)).encode(), "application/json", commit)
        if match[3] not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send(files[match[3]], "application/octet-stream", commit)

    do_HEAD = do_GET

    def describe(self, api: re.Match[str], commit: str, files: dict[str, bytes]) -> Any:
        if api[2] == "tree":
            return list_folder(files, (api[4] or "").strip("/"), recursive="recursive=True" in self.path)
        name = api[1].partition("/")[2]
        return {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files], "tags": []}

    def send(self, content: bytes, kind: str, commit: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


def list_folder(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """A folder's entries, as the hub describes them."""
    entries: dict[str, dict[str, Any]] = {}
    prefix = f"{folder}/" if folder else ""
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        oid = hashlib.sha1(content).hexdigest()
        entries[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        first, slash, _ = name.removeprefix(prefix).partition("/")
        if slash and not recursive:
            del entries[name]
            entries[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
    return list(entries.values())


class Server(ThreadingHTTPServer):
    """Serves one `Hub`."""

    daemon_threads = True
    hub: Hub


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub with these repositories, as long as the context lasts."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class User:
    """Runs scripts with a hub cache of its own."""

    home: Path
    endpoint: str

    def run(self, script: str, *calls: tuple[str, str | None], **environment: str) -> list[dict[str, Any]]:
        """What became of each call, all in one process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        settings = {
            "PYTHONPATH": str(SRC),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", script, json.dumps(calls)]
        result = subprocess.run(
            command, env={**kept, **settings, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        return list(json.loads(result.stdout.splitlines()[-1]))
