"""Checkpoints of a run that are there whole or not at all.

A checkpoint is written in `OUTPUT/.incomplete` and moved to its place when all of it is on the disk; whatever stops
the writing leaves the earlier ones alone.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from layerskip.errors import CheckpointError

STAGING = ".incomplete"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, the latest last."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(path.name.removeprefix("checkpoint-"))


@contextmanager
def writing(output: Path, what: str) -> Iterator[Path]:
    """A folder to write into, empty at first and gone afterwards.

    Args:
        output: The run's folder.
        what: What is written, for the error message.

    Raises:
        CheckpointError: Something could not be written, because the disk is full for example.
    """
    staging = output / STAGING
    try:
        for left_over in (staging, *output.glob(".deleted-*")):
            shutil.rmtree(left_over, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
    except Exception as error:
        # safetensors and torch report a full disk by errors of their own, tokenizers by a bare Exception
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)) and type(error) is not Exception:
            raise
        kept = list_checkpoints(output)
        rest = f"the last complete checkpoint, {kept[-1]}, is untouched" if kept else "no checkpoint is there yet"
        raise CheckpointError(
            f"cannot write {what} in {output}: {error}; {rest}: make room, then go on with --resume"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into_place(staged: Path, target: Path) -> None:
    """Make a folder that was written elsewhere on the same disk appear as a whole."""
    for path in staged.rglob("*"):
        if path.is_file():
            _flush(path)
    if target.exists():
        delete(target)
    os.replace(staged, target)
    _flush(target.parent)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; one that is half deleted doesn't count as a checkpoint."""
    doomed = checkpoint.with_name(f".deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
