"""Checkpoints of a run, each complete or absent.

A checkpoint is written to `OUTPUT/.incomplete` and moved to its place when all of it is on the disk, so an interruption
leaves the earlier checkpoints intact.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from layerskip.errors import CheckpointError
from layerskip.files import parse_json

STAGING = ".incomplete"
MANIFEST = "files.json"
"""File with the names and bytes of a checkpoint's files."""
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
        what: Name of the content, for the error message.

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
        # safetensors and torch report a full disk by their own errors, tokenizers by a bare Exception
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)) and type(error) is not Exception:
            raise
        kept = list_checkpoints(output)
        rest = f"the last complete checkpoint, {kept[-1]}, is untouched" if kept else "no checkpoint is there yet"
        raise CheckpointError(
            f"cannot write {what} in {output}: {error}; {rest}: make room, then go on with --resume"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def last_intact(output: Path, on_message: Callable[[str], None]) -> Path | None:
    """The latest complete checkpoint; None if there is no checkpoint at all.

    Args:
        output: The run's folder.
        on_message: Called with a line for each damaged checkpoint and the reason.

    Raises:
        CheckpointError: There are checkpoints, and none is intact.
    """
    damages = []
    for checkpoint in reversed(list_checkpoints(output)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        damages.append(f"{checkpoint} is damaged: {damage}")
        on_message(f"{damages[-1]}; looking for an earlier one")
    if damages:
        raise CheckpointError(
            f"no checkpoint of the run is intact ({'; '.join(damages)}); bring one back, or begin the run again in "
            "another folder"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint; None if nothing is, or if it has no list of its files."""
    try:
        sizes = parse_json((checkpoint / MANIFEST).read_text("utf-8"))
        for name, size in sizes.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
    except FileNotFoundError:  # an earlier version wrote no list, or it was lost: look for the weights
        return None if (checkpoint / "trainer_state.json").is_file() else "trainer_state.json is missing"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{MANIFEST} can't be read"
    return None


def move_into_place(staged: Path, target: Path) -> None:
    """Move a complete folder to its place on the same disk, in one step."""
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in sorted(staged.rglob("*")) if path.is_file()}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")
    for path in staged.rglob("*"):
        if path.is_file():
            _flush(path)
    if target.exists():
        delete(target)
    os.replace(staged, target)
    _flush(target.parent)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; a half-deleted one doesn't count as a checkpoint."""
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
