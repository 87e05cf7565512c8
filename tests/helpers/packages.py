"""Installed packages of a named model, laid out as pip does, in a folder of the test's own."""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from layerskip.checkpoint import names
from layerskip.checkpoint.known_file import KnownFile
from layerskip.checkpoint.names import PackagedModel, Piece

RUNS_NEVER = "raise SystemExit('the package was imported')\n"


def content_of(number: int, size: int = 3 << 20) -> bytes:
    """Bytes that a piece may hold, different for each number."""
    return hashlib.shake_256(bytes([number])).digest(size)


def known(content: bytes) -> KnownFile:
    """A file's content, by its length and hash."""
    return KnownFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def make_model(num_pieces: int) -> tuple[PackagedModel, dict[str, bytes]]:
    """A named model in one package or in several with a collection; and the content of each package's file."""
    contents = {f"some-model-part{number}": content_of(number) for number in range(num_pieces)}
    pieces = tuple(
        Piece(package=package, file=f"data/weights.part{number}", content=known(content))
        for number, (package, content) in enumerate(contents.items())
    )
    model = PackagedModel(
        file="weights.gguf",
        content=known(b"".join(contents.values())),
        pieces=pieces,
        version="1.0.0",
        collection="some-model" if num_pieces > 1 else None,
        hub_id="owner/original",
    )
    return model, contents


def install(site: Path, package: str, file: str | None, content: bytes, version: str | None = "1.0.0") -> Path:
    """Lay a package out.

    Args:
        site: The folder of all packages.
        package: As pip calls it.
        file: Of the package's folder, or None for one without data.
        content: Of the file.
        version: As the metadata says, or None for a package without metadata.

    Returns:
        The file.
    """
    folder = site / package.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(RUNS_NEVER)
    if version is not None:
        info = site / f"{folder.name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if file is not None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    return folder / (file or "__init__.py")


def install_all(site: Path, model: PackagedModel, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Lay all packages of a model out; the files by package."""
    if model.collection is not None:
        install(site, model.collection, None, b"")
    return {piece.package: install(site, piece.package, piece.file, contents[piece.package]) for piece in model.pieces}


@contextmanager
def named(name: str, model: PackagedModel, site: Path) -> Iterator[None]:
    """Let a name stand for a model, with a folder of packages to look in."""
    with patch.object(names, "MODELS", {name: model}), patch.object(sys, "path", [str(site), *sys.path]):
        yield
