"""Five hundred damaged checkpoints in Hugging Face's format: each generates, or is refused in one line.

Damage is of the kinds that downloads, editors and other programs do (cut, overwritten, spliced, values of other kinds),
and of those that a hostile file would try (huge numbers, nesting without end, offsets outside the file).
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.cli.main import main
from layerskip.errors import LayerSkipError

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
EACH = 100
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, 0.0, -0.5, 10**9, 2**63, 10**30, 10**400, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "1e-5", "silu", "\ud800", [], {}, [[]], [0], [10**9], {"a": None}, "a" * 10_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all files."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(tiny_checkpoint(tokenizer=True, tie_word_embeddings=True), folder)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    more = {"rope_scaling": {**scaling, "original_max_position_embeddings": 64}, "rope_theta": 10000.0, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.6}))
    return folder


def damage(content: bytes, pick: random.Random, is_json: bool) -> bytes:
    """The content, damaged in one of several ways."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [cut, flip, splice]
    if is_json:
        ways += [change_value, change_value, change_value, drop_key, nest]
    else:
        ways += [change_header, change_header, change_header, change_length]
    return pick.choice(ways)(content, pick)


def cut(content: bytes, pick: random.Random) -> bytes:
    return content[: pick.randrange(len(content))]


def flip(content: bytes, pick: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(pick.randint(1, 8)):
        changed[pick.randrange(min(len(changed), 5000))] = pick.randrange(256)
    return bytes(changed)


def splice(content: bytes, pick: random.Random) -> bytes:
    place, length = pick.randrange(len(content)), pick.randint(1, 300)
    return content[:place] + content[place : place + length] * pick.choice([0, 2]) + content[place + length :]


def places(content: Any) -> list[tuple[Any, Any]]:
    """Containers and keys of all values in a JSON tree; of long lists, some."""
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content[:20]))
    found = [(content, key) for key, _ in items]
    return found + [place for _, value in items if isinstance(value, dict | list) for place in places(value)]


def change_value(content: bytes, pick: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(pick.randint(1, 2)):
        container, key = pick.choice(places(tree) or [(tree, "new")])
        container[key] = pick.choice(VALUES)
    return json.dumps(tree).encode()


def drop_key(content: bytes, pick: random.Random) -> bytes:
    tree = json.loads(content)
    container, key = pick.choice(places(tree))
    del container[key]
    return json.dumps(tree).encode()


def nest(content: bytes, pick: random.Random) -> bytes:
    depth = pick.choice([500, 5000, 100_000])
    return pick.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def change_header(content: bytes, pick: random.Random) -> bytes:
    tree, data = header(content)
    name = pick.choice([name for name in tree if name != "__metadata__"])
    entry = tree[name]
    match pick.randrange(5):
        case 0:
            entry["dtype"] = pick.choice(["F16", "I8", "F64", "BOOL", "U64", "F8_E4M3", "X", None])
        case 1:
            entry["shape"] = pick.choice([[0], [], [2**40, 2**40], [-1, 4], ["a"], None])
        case 2:
            entry["data_offsets"] = pick.choice([[0, 2**50], [5, 1], [-4, 4], [0, 0], [0], None])
        case 3:
            tree[f"{name}.more"] = tree.pop(name)
        case _:
            del tree[name]
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + data


def change_length(content: bytes, pick: random.Random) -> bytes:
    return struct.pack("<Q", pick.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:]


def attempt(folder: Path) -> LayerSkipError | None:
    """Load and generate, or say why not."""
    try:
        lm = layerskip.load(str(folder), device="cpu")
        lm.generate(["the red fox"], max_new_tokens=2)
    except LayerSkipError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_damaged_files(whole: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    content = (whole / file).read_bytes()
    assert attempt(folder) is None
    refused = 0
    for seed in range(EACH):
        (folder / file).write_bytes(damage(content, random.Random(f"{file} {seed}"), file.endswith(".json")))
        error = attempt(folder)
        refused += error is not None
        assert "\n" not in str(error), seed
        assert len(str(error)) < 2000, seed
    assert refused >= EACH // 10


def test_the_command_line_says_it_in_one_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "model")
    capsys.readouterr()
    for file in FILES:
        content = (whole / file).read_bytes()
        for seed in range(4):
            (tmp_path / "model" / file).write_bytes(cut(content, random.Random(seed)))
            model = str(tmp_path / "model")
            assert main(["generate", "--model", model, "--prompt", "the fox", "--max-new-tokens", "2"]) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.count("\n") == 1
        (tmp_path / "model" / file).write_bytes(content)
