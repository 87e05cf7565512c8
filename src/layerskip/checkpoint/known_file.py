"""Large files with a known SHA-256: hashed once, recognised by size and time afterwards, joined from their parts."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from layerskip.files import cache_folder, parse_json, write_atomically

CHUNK = 1 << 20
"""Bytes read at a time."""

Report = Callable[[int, int], None]
"""Called with the number of bytes done so far, and the number in all."""


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """A file's content, by its length and hash."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal digits."""


def is_intact(path: Path, known: KnownFile, report: Report | None = None) -> bool:
    """Whether a file is there and is the known one.

    It is hashed once. After that it counts as intact for as long as its size and time of change stay the same.

    Args:
        path: The file.
        known: The content that it should have.
        report: Called with the progress of hashing.

    Raises:
        OSError: The file can't be read.
    """
    if not path.is_file() or path.stat().st_size != known.size:
        return False
    if _remembered(known).get(str(path.resolve())) == path.stat().st_mtime_ns:
        return True
    if hash_file(path, report) != known.sha256:
        return False
    _remember(path, known)
    return True


def hash_file(path: Path, report: Report | None = None) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    for chunk in _chunks([path], report):
        digest.update(chunk)
    return digest.hexdigest()


def join(parts: Sequence[Path], target: Path, known: KnownFile, report: Report | None = None) -> bool:
    """Write a file that consists of parts; until it is complete, it has another name.

    Where several processes want the same file, one writes it and the others wait.

    Args:
        parts: Its parts, in order.
        target: Where it belongs; the folder is made if need be.
        known: The content that it should have.
        report: Called with the progress.

    Returns:
        Whether the parts make the known file; nothing is written otherwise.

    Raises:
        OSError: A part can't be read, or the folder can't be written or is full.
    """
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if is_intact(target, known):  # another process was faster
            return True
        try:
            if _copy(parts, partial, report) != known.sha256:
                return False
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _remember(target, known)
    return True


def _copy(parts: Sequence[Path], target: Path, report: Report | None) -> str:
    """Write the parts one after another, and return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in _chunks(parts, report):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # the name mustn't outlive a power cut that the content doesn't
    return digest.hexdigest()


def _chunks(paths: Sequence[Path], report: Report | None) -> Iterator[bytes]:
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
                done += len(chunk)
                if report is not None:
                    report(done, total)


def _record(known: KnownFile) -> Path:
    return cache_folder() / "models" / f"{known.sha256[:16]}.json"


def _remembered(known: KnownFile) -> dict[str, int]:
    """Time of change, in nanoseconds, of each file that had this hash."""
    with suppress(OSError, ValueError):
        content = parse_json(_record(known).read_text("utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _remember(path: Path, known: KnownFile) -> None:
    record = _record(known)
    content = {**_remembered(known), str(path.resolve()): path.stat().st_mtime_ns}
    with suppress(OSError):  # then the file is hashed again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(content, indent=1) + "\n")
