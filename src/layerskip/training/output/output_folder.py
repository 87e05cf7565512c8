"""The folder of a run: which run it belongs to, and the files that the run writes to it."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.loading.placement import DTYPES
from layerskip.differences import differences
from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.files import write_atomically
from layerskip.locks import Lock
from layerskip.training.config import TrainingConfig
from layerskip.training.output.checkpoints import list_checkpoints, writing
from layerskip.training.settings_file import read_settings, write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE = "training.toml"
RESULT_FILE = "training.json"
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"


@contextmanager
def claim(output: Path, config: TrainingConfig, resume: bool) -> Iterator[None]:
    """Make `output` the folder of this run, or check that it is. No other process can use it until the block ends."""
    with ExitStack() as locks:
        if output.is_dir():  # otherwise it is made after the checks, so that a mistake leaves nothing behind
            locks.enter_context(_lock(output))
            _check(output, config, resume)
        else:
            _check(output, config, resume)
            try:
                output.mkdir(parents=True)
            except OSError as error:
                raise _unwritable(output, error) from error
            locks.enter_context(_lock(output))
        try:
            if not resume:  # a run that failed before its first step may have left a tokenizer of other data
                (output / "tokenizer.json").unlink(missing_ok=True)
            write_atomically(output / SETTINGS_FILE, write_settings(config))
        except OSError as error:
            raise _unwritable(output, error) from error
        yield


def _check(output: Path, config: TrainingConfig, resume: bool) -> None:
    """Raise `InvalidArgumentError` if a run with these settings can't begin or go on in `output`."""
    file = output / SETTINGS_FILE
    if not resume:
        if output.is_file():
            raise InvalidArgumentError(f"{output} is a file; name a folder")
        if (output / LOG_FILE).exists() or list_checkpoints(output):
            raise InvalidArgumentError(f"{output} already holds a training run; resume it, or choose another folder")
        if not file.exists() and any((output / name).exists() for name in ("config.json", "tokenizer.json")):
            raise InvalidArgumentError(f"{output} holds a model, which training would overwrite; choose another folder")
    elif not file.is_file():
        raise InvalidArgumentError(f"there is no run to resume in {output}: it has no {SETTINGS_FILE}")
    else:
        changed = changed_settings(read_settings(file, TrainingConfig), config)
        if changed:
            raise InvalidArgumentError(
                f"{output} holds a run with other settings ({', '.join(changed)}), so it can't be resumed with these"
            )


def _lock(output: Path) -> Lock:
    try:
        return Lock(output / LOCK_FILE, str(output))
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"{output} can't be written to: {error.strerror}")


def changed_settings(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    """Settings that change what is learned, with both values; how often things are saved doesn't."""
    old, new = asdict(before), asdict(now)
    tables = (table for table in new if table != "checkpoints")
    return [setting for table in tables for setting in differences(old[table], new[table])]


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", output: Path) -> None:
    """Write the tokenizer into the run's folder, before training begins."""
    with writing(output, "the tokenizer") as staging:
        tokenizer.save_pretrained(staging)
        # tokenizer.json comes last: if it is there, a resumed run takes the tokenizer as complete.
        move_files(staging, output, last="tokenizer.json")


def save_result(result: Any, output: Path) -> None:
    """Write the result of the run into its folder.

    Raises:
        CheckpointError: It can't be written.
    """
    try:
        write_atomically(output / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{output / RESULT_FILE} can't be written: {error.strerror}; make room") from error


def move_files(staging: Path, output: Path, *, last: str) -> None:
    """Move the files of a staging folder into the run's folder, the one named `last` last."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == last):
        os.replace(path, output / path.name)


def dtype_to_save(config: TrainingConfig, own: torch.dtype) -> torch.dtype:
    """Type of the final weights; `own` is the type of the model that training started from."""
    if config.checkpoints.save_dtype != "auto":
        return DTYPES[config.checkpoints.save_dtype]
    return own
