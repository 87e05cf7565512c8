"""Where exports go: a new folder or file, complete or absent, and files of the source that are linked into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layerskip.errors import CheckpointError, InvalidArgumentError, brief


@contextmanager
def new_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into, beside `output`, whose place it takes when the block ends without an error.

    Args:
        output: A folder that doesn't exist yet, or is empty.
        num_bytes: Bytes that will be written.

    Raises:
        InvalidArgumentError: Before the block: there is something in `output`, its place can't be written, or its disk
            has too little room.
        CheckpointError: Something can't be written, because the disk is full for example.
    """
    output = _resolve(output)
    if output.is_dir() and any(output.iterdir()):
        raise InvalidArgumentError(f"{output} exists and isn't empty; name a new folder, or delete that one first")
    if output.exists() and not output.is_dir():
        raise InvalidArgumentError(f"{output} is a file; name a folder")
    with _staging(output, num_bytes) as staging:
        (staging / output.name).mkdir()
        yield staging / output.name
        _settle(staging / output.name)
        if output.exists():
            output.rmdir()
        os.replace(staging / output.name, output)


@contextmanager
def new_file(output: Path, num_bytes: int) -> Iterator[Path]:
    """A file to write, beside `output`, whose place it takes when the block ends without an error.

    Args:
        output: A file that doesn't exist yet.
        num_bytes: Bytes that will be written.

    Raises:
        InvalidArgumentError: As `new_folder`.
        CheckpointError: As there.
    """
    output = _resolve(output)
    if output.exists():
        kind = "is a folder; name a file" if output.is_dir() else "exists; name a new file, or delete that one first"
        raise InvalidArgumentError(f"{output} {kind}")
    with _staging(output, num_bytes) as staging:
        yield staging / output.name
        _settle(staging)
        os.replace(staging / output.name, output)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` another name of a file, or a copy where the file system has no links or is another one.

    Returns:
        Whether it is a link.
    """
    source = source.resolve()  # the hub's cache consists of links, which a hard link would repeat
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def is_elsewhere(source: Path, output: Path) -> bool:
    """Whether a file would have to be copied, because `output` is on another file system."""
    output = _resolve(output)
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    return source.resolve().stat().st_dev != there.stat().st_dev


def _resolve(output: Path) -> Path:
    try:
        return output.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, or no such user
        raise InvalidArgumentError(f"{output} can't be a path ({brief(error)}); name another place") from error


@contextmanager
def _staging(output: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `output`, gone afterwards, as are folders above it that had to be made in vain."""
    staging = output.with_name(f".{output.name}.{os.getpid()}.incomplete")
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        _remove_empty(made)
        raise InvalidArgumentError(
            f"{output} can't be written ({error.strerror or error}); name a place where you may write"
        ) from error
    try:
        free = shutil.disk_usage(staging).free
        if free < num_bytes:
            raise InvalidArgumentError(
                f"{output} takes {num_bytes / 1e6:.1f} MB, and its disk has {free / 1e6:.1f} MB free; make room, or "
                "name a place on another disk"
            )
        with _explained(output):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Turn what libraries raise when they can't write into one error."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # safetensors reports a full disk by an error of its own, tokenizers by a bare Exception
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise CheckpointError(
            f"{output} can't be written: {brief(error)}; nothing is left of it: make room, and try again"
        ) from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the lowest first
        with suppress(OSError):
            folder.rmdir()


def _settle(folder: Path) -> None:
    """Wait until new files are on the disk, and give them the mode of new files: safetensors makes them private."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:  # others are links to the source's files
            path.chmod(mode)
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
