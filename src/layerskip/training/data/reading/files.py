"""Documents of files, folders, and the sources of Python's standard library."""

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.reading.documents import Document, TextDocument
from layerskip.training.data.reading.record_files import RECORD_SUFFIXES, read_records
from layerskip.training.data.reading.records import read_record

STDLIB = "python-stdlib"
# Sources and prose, no data (.json, .csv, .svg): data files are long, repetitive, and unlike the texts to generate.
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
    """Documents of one file: its records, or else the whole text; none if the file is empty.

    Raises:
        InvalidArgumentError: It can't be read, isn't text, or is data whose suffix doesn't say so.
    """
    if path.suffix.lower() in RECORD_SUFFIXES:
        yield from _read_record_file(path, text_field)
        return
    text = _read_text(path)
    if text is None:
        raise InvalidArgumentError(
            f"{path} is not a UTF-8 text file; convert it to UTF-8 text, or to one of {', '.join(_sorted_records())}"
        )
    if path.suffix.lower() not in SUFFIXES and _is_json(text):
        raise InvalidArgumentError(
            f"{path} holds JSON, and would be learned with all its braces; call it .json or .jsonl if it has records, "
            "or .txt if that is what you want"
        )
    if text.strip():
        yield TextDocument(origin=str(path), text=text)


def read_folder(folder: Path, suffixes: tuple[str, ...], text_field: str | None) -> Iterator[Document]:
    """Documents of a folder and its subfolders, by path; hidden folders and files that aren't text are left out.

    Args:
        folder: The folder.
        suffixes: Endings of the files to read, in lower case; the usual ones of sources and texts if empty.
        text_field: As for `read_record`, in case files of records are among them.

    Raises:
        InvalidArgumentError: A file can't be read, or the only files that could be read have other suffixes.
    """
    paths = folder_files(folder, suffixes)
    if not paths:
        _check_other_files(folder)
    for path in paths:
        if path.suffix.lower() in RECORD_SUFFIXES:
            yield from _read_record_file(path, text_field)
            continue
        text = _read_text(path)
        if text and text.strip():
            yield TextDocument(origin=str(path), text=text)


def folder_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files to read from a folder, by path."""
    wanted = frozenset(suffixes) or SUFFIXES
    paths = (folder / name for name in _walk(folder, SKIPPED_FOLDERS))
    return [path for path in paths if path.suffix.lower() in wanted and path.is_file()]


def read_stdlib(*, with_tests: bool = False) -> Iterator[Document]:
    """Python sources of the running interpreter's standard library.

    Args:
        with_tests: Also the library's tests and IDLE.
    """
    for name, path in stdlib_files(with_tests=with_tests).items():
        text = _read_text(path)
        if text and text.strip():
            yield TextDocument(origin=f"{STDLIB}/{name}", text=text)


def stdlib_files(*, with_tests: bool = False) -> dict[str, Path]:
    """Python sources of the standard library by their paths in it, in order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = SKIPPED_FOLDERS | STDLIB_SKIPPED | (frozenset() if with_tests else STDLIB_TESTS)
    return {name: folder / name for name in _walk(folder, skipped) if name.endswith(".py")}


def _read_record_file(path: Path, text_field: str | None) -> Iterator[Document]:
    for record, origin in read_records(path):
        yield from read_record(record, text_field, origin)


def _check_other_files(folder: Path) -> None:
    found = Counter(Path(name).suffix.lower() for name in _walk(folder, SKIPPED_FOLDERS))
    records = {suffix: found[suffix] for suffix in _sorted_records() if found[suffix]}
    if records:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in records.items())
        raise InvalidArgumentError(
            f"{folder} has no files of text but files of records ({listed}); read them with suffixes "
            f"{' '.join(records)}, or name a file"
        )


def _sorted_records() -> list[str]:
    return sorted(RECORD_SUFFIXES)


def _is_json(text: str) -> bool:
    """Whether a text is one JSON array or object, or has one in each line."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return False
    for part in (text, start.partition("\n")[0]):
        try:
            json.loads(part)
        except (ValueError, RecursionError):
            continue
        return True
    return False


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
    """Contents of a text file, with plain line ends; None if the file isn't UTF-8 or is binary."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise InvalidArgumentError(f"{path} can't be read: {error}; check its permissions, or leave it out") from error
    return None if "\0" in text else text
