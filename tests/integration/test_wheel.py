"""A wheel as pip builds it: it has a library for every instruction set, and each of them writes the same text."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BUILD: dict[str, Any] = runpy.run_path(str(ROOT / "hatch_build.py"))
MOST_BYTES = 40 * 2**20
"""Of a wheel without the embedded weights."""
OFFLINE = ("No matching distribution", "Could not find a version", "No module named 'hatchling'", "ConnectionError")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BUILD["find_compiler"](), reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, so that nothing changes in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("_native*.so", "__pycache__")
    for name in ("native", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".gitignore").write_text("_native*.so\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--retries",
        "1",
        "--wheel-dir",
        str(folder),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("the build tool (hatchling) can't be had now")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("layerskip-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel has."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the package that the wheel has."""
    return subprocess.run(
        [sys.executable, "-m", "layerskip", *arguments],
        env={**os.environ, "PYTHONPATH": str(installed), **environment},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_has_all_libraries(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    libraries = {name.rpartition("/")[2] for name in sizes if name.endswith(".so")}
    known = {
        name
        for name, flags in BUILD["targets"]().items()
        if subprocess.run(
            [*BUILD["find_compiler"](), *flags, "-x", "c++", "-fsyntax-only", os.devnull], check=False
        ).returncode
        == 0
    }
    assert libraries == known
    assert "none-any" not in wheel.name
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert sum(sizes.values()) - weights < MOST_BYTES


def test_each_library_writes_the_same_text(installed: Path) -> None:
    info = run(installed, ["info", "--json"])
    assert info.returncode == 0, info.stderr
    variants = json.loads(info.stdout)["kernels"]["variants"]
    assert [entry["file"] for entry in variants if entry["outdated"]] == []
    usable = [entry["target"] for entry in variants if entry["usable"]]
    if not usable:
        pytest.skip("this processor runs none of the libraries")
    texts = set()
    for target in usable:
        asked = ["generate", "--prompt", "def add(a, b):", "--max-new-tokens", "48", "--json"]
        for way, environment in (([], {"LAYERSKIP_CPU": target}), (["--kernels", f"native:{target}"], {})):
            done = run(installed, [*asked, *way], **environment)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            texts.add(json.loads(done.stdout)["text"])
    assert len(texts) == 1
    for entry in variants:
        if not entry["usable"]:
            done = run(installed, ["info"], LAYERSKIP_CPU=entry["target"])
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert entry["problem"] in done.stderr
