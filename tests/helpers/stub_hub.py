"""A small hub on this machine, and a user of it whose calls run in processes of their own."""

import base64
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
    private: bool = False
    """As it was asked for when somebody made the repository."""


@dataclass
class Hub:
    """The stub's content and what it was asked."""

    url: str
    repositories: dict[str, Repository]
    """By name; those of data sets begin with `datasets/`."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, Authorization header."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Contents of large files that were uploaded, by SHA-256."""
    owners: dict[str, str] = field(default_factory=dict)
    """Who may write where: owner by token."""

    def files_sent(self) -> set[str]:
        """Names of the files whose contents were sent."""
        found = (re.search(r"/resolve/[^/]+/(.+)", path) for method, path, _ in self.requests if method == "GET")
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that `snapshot_download`, `load_dataset` and `create_commit` use."""

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

    def do_POST(self) -> None:
        hub, path = self.server.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.make_repository(json.loads(body))
        commit = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        name = (commit or batch)[1] if commit or batch else ""
        repository = hub.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if repository.broken:
            return self.refuse(repository.broken, "")
        if not self.may_write(name.partition("/")[0]):
            return self.refuse(403, "Forbidden")
        if batch:
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.send_json({"transfer": "basic", "objects": objects})
        if commit and commit[2] == "preupload":
            return self.send_json({"files": [upload_mode(file) for file in json.loads(body)["files"]]})
        return self.commit_files(name, repository, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        hub.large[self.path.removeprefix("/large/")] = content
        self.send_json({})

    def may_write(self, owner: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.hub.owners.get(token) == owner

    def make_repository(self, asked: dict[str, Any]) -> None:
        hub, name = self.server.hub, f"{asked['organization']}/{asked['name']}"
        if not self.may_write(asked["organization"]):
            return self.refuse(403, "Forbidden")
        if name in hub.repositories:
            return self.send_json({"url": f"{hub.url}/{name}"}, status=409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        hub.repositories[name] = Repository({"0" * 40: {}}, {"main": "0" * 40}, private=private)
        return self.send_json({"url": f"{hub.url}/{name}"})

    def commit_files(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        """One commit: small files are in the request, large ones were uploaded before."""
        files = dict(repository.commits[repository.revisions["main"]])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.hub.large[line["value"]["oid"]]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[commit], repository.revisions["main"] = files, commit
        url = f"{self.server.hub.url}/{name}/commit/{commit}"
        self.send_json({"success": True, "commitUrl": url, "commitOid": commit})

    def send_json(self, content: Any, *, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    """How a file is to be uploaded: weights as large files, whatever their size."""
    large = file["path"].endswith((".safetensors", ".gguf"))
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


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
