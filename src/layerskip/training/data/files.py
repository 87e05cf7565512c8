"""Text files, folders of them, and the sources of Python's standard library -> documents."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.documents import Document, TextDocument
from layerskip.training.data.records import read_json_lines

JSON_LINES = ".jsonl"
STDLIB = "python-stdlib"
# Sources and prose. No data (.json, .csv, .svg): long, repetitive, and little like what one wants written.
SUFFIXES = frozenset(
    """
    .txt .md .rst .tex .py .pyi .pyx .ipy .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .java .kt .kts .scala
    .groovy .js .jsx .mjs .ts .tsx .vue .svelte .go .rs .rb .php .swift .cs .fs .fsx .vb .lua .pl .pm .r .jl .hs .ml
    .mli .elm .ex .exs .erl .clj .cljs .lisp .el .scm .rkt .zig .nim .d .dart .f90 .f95 .f .v .sv .vhd .sql .sh
    .bash .zsh .fish .ps1 .bat .html .css .scss .less .toml .yaml .yml .cmake .proto .graphql .tf .dockerfile
    """.split()
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
# Packages installed below the standard library, and test data, which is broken on purpose.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "lib2to3/tests/data"})
STDLIB_TESTS = frozenset({"test", "tests", "idlelib"})


def read_file(path: Path, text_field: str | None) -> Iterator[Document]:
    """Documents of one file: each record of a .jsonl file, or else the whole text; none if it is empty.

    Raises:
        InvalidArgumentError: It can't be read, or isn't text.
    """
    if path.suffix.lower() == JSON_LINES:
        yield from read_json_lines(path, text_field)
        return
    text = _read_text(path)
    if text is None:
        raise InvalidArgumentError(f"{path} is not a UTF-8 text file; convert it to UTF-8 text or .jsonl")
    if text.strip():
        yield TextDocument(origin=str(path), text=text)


def read_folder(folder: Path, suffixes: tuple[str, ...], text_field: str | None) -> Iterator[Document]:
    """Documents of a folder and those below it, by path; what isn't text is left out, and so are hidden folders.

    Args:
        folder: The folder.
        suffixes: Endings of the files to read, in lower case; the usual ones of sources and texts if empty.
        text_field: As for `read_json_lines`, in case .jsonl is one of the suffixes.
    """
    wanted = frozenset(suffixes) or SUFFIXES
    for name in _walk(folder, SKIPPED_FOLDERS):
        path = folder / name
        if not path.is_file() or path.suffix.lower() not in wanted:
            continue
        if path.suffix.lower() == JSON_LINES:
            yield from read_json_lines(path, text_field)
            continue
        text = _read_text(path)
        if text and text.strip():
            yield TextDocument(origin=str(path), text=text)


def read_stdlib(*, with_tests: bool = False) -> Iterator[Document]:
    """Python sources of the running interpreter's standard library.

    Args:
        with_tests: Also its tests and IDLE.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in _walk(folder, SKIPPED_FOLDERS | STDLIB_SKIPPED | (frozenset() if with_tests else STDLIB_TESTS)):
        if not name.endswith(".py"):
            continue
        text = _read_text(folder / name)
        if text and text.strip():
            yield TextDocument(origin=f"{STDLIB}/{name}", text=text)


def _walk(folder: Path, skipped: frozenset[str]) -> Iterator[str]:
    """Yield paths of files relative to `folder`, in order; `skipped` are names of folders, or their ends of paths."""
    for parent, folders, names in os.walk(folder):
        place = Path(parent).relative_to(folder).as_posix()
        prefix = "" if place == "." else f"{place}/"
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not {name, prefix + name} & skipped
        )
        yield from (prefix + name for name in sorted(names))


def _read_text(path: Path) -> str | None:
    """Contents of a text file, with plain line ends; None if it isn't UTF-8 or has bytes that no text has."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise InvalidArgumentError(f"{path} can't be read: {error}; check its permissions, or leave it out") from error
    return None if "\0" in text else text
