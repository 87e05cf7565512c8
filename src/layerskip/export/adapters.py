"""Exit adapters and their base model: together in one folder, and apart again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, WEIGHTS_FILE, read_adapters, write_adapters
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.checkpoint.hub import PATTERNS
from layerskip.checkpoint.loading.adapters import AdapterSet, check_base, check_ends, tensor_name
from layerskip.checkpoint.names import MODELS
from layerskip.errors import InvalidArgumentError
from layerskip.export.places import is_elsewhere, link_or_copy, new_folder

OTHER_FILES = ("tekken.json", "LICENSE*", "NOTICE*")
"""Files that go with a checkpoint besides those that are loaded."""
SMALL_FILES = 1 << 20
"""Bytes set aside for descriptions."""


@dataclass(frozen=True, kw_only=True)
class AdapterExport:
    """Exit adapters that were written, with their base or without."""

    output: str
    base: str
    """What the base is called, in the adapters' description."""
    weights_hash: str
    """Hash by which the base is recognised, wherever it lies."""
    exits: tuple[int, ...]
    num_linked: int
    """Files that are links."""
    num_bytes: int
    """Bytes of all files."""
    notes: tuple[str, ...] = ()


def merge_adapters(checkpoint: Checkpoint, folders: Sequence[Path], output: Path) -> AdapterExport:
    """Write a folder with a model and its exit adapters, in which `load` finds both.

    Args:
        checkpoint: The base model; a GGUF file or a folder, whose files are linked.
        folders: Folders of adapters, each for other exits. If none is given, the adapters that belong to the model.
            Adapters that lie with the model already are kept.
        output: A new folder.

    Raises:
        InvalidArgumentError: Adapters of another model, two for one exit, or none at all; or `output` isn't empty or
            can't be written.
        CheckpointError: Files are damaged, or the disk is full.
    """
    sets = [read_adapters(folder.expanduser()) for folder in folders]
    own = checkpoint.find_exit_adapters()
    if own is not None:
        sets.insert(0, own)
    if not sets:
        raise InvalidArgumentError(
            f"{checkpoint.name} has no exit adapters by itself; name the folders with --exit-adapters DIR"
        )
    for adapters in sets:
        check_base(adapters, checkpoint.name, checkpoint.network_config, checkpoint.weights)
        check_ends(adapters, checkpoint.config.vocab_size, checkpoint.eos_token_ids)
    merged, tensors = _together(sets, MODELS[checkpoint.name].hub_id if checkpoint.name in MODELS else None)
    notes = []
    if checkpoint.files.tuned_file.is_file():
        notes.append("the setting that a sweep found best is left out: it was measured without these adapters")
    sources = _base_files(checkpoint)
    copied = sum(path.stat().st_size for path in sources if is_elsewhere(path, output))
    with new_folder(output, copied + _bytes(tensors) + SMALL_FILES) as folder:
        linked = sum(link_or_copy(path, folder / path.name) for path in sources)
        files = checkpoint.files
        place = GGUFFile(folder / files.path.name).adapters_folder if isinstance(files, GGUFFile) else folder
        place.mkdir(exist_ok=True)
        write_adapters(place, merged, tensors)
        return _result(merged, output, folder, linked, notes)


def split_adapters(
    checkpoint: Checkpoint, output: Path, *, exits: Sequence[int] = (), base: str | None = None
) -> AdapterExport:
    """Write a model's exit adapters into a folder of their own, which names the base.

    Args:
        checkpoint: The model, with the adapters.
        output: A new folder.
        exits: Exits whose adapters are taken; all if none is named.
        base: What the base is called from now on, such as a hub id; if not given, as the adapters say.

    Raises:
        InvalidArgumentError: There are no adapters, or not at these exits; or `output` isn't empty or can't be written.
        CheckpointError: Files are damaged, or the disk is full.
    """
    adapters = checkpoint.find_exit_adapters()
    if adapters is None:
        raise InvalidArgumentError(f"{checkpoint.name} has no exit adapters, so there is nothing to take out")
    there = sorted(adapter.exit_layer for adapter in adapters.adapters)
    missing = sorted(set(exits) - set(there))
    if missing:
        raise InvalidArgumentError(
            f"{checkpoint.name} has no exit adapter at exit {missing[0]}; it has some at {', '.join(map(str, there))}"
        )
    chosen = tuple(adapter for adapter in adapters.adapters if not exits or adapter.exit_layer in exits)
    part, tensors = _together([replace(adapters, adapters=chosen)], base)
    with new_folder(output, _bytes(tensors) + SMALL_FILES) as folder:
        write_adapters(folder, part, tensors)
        return _result(part, output, folder, 0, [])


def _together(sets: Sequence[AdapterSet], base: str | None) -> tuple[AdapterSet, dict[str, Tensor]]:
    """Several sets for one model as one, and their tensors."""
    tensors: dict[str, Tensor] = {}
    folder_of: dict[int, Any] = {}
    for adapters in sets:
        assert adapters.weights is not None
        for adapter in adapters.adapters:
            if adapter.exit_layer in folder_of:
                raise InvalidArgumentError(
                    f"both {folder_of[adapter.exit_layer]} and {adapters.folder} have an adapter for exit "
                    f"{adapter.exit_layer}, and an exit has one at most; leave one out (layerskip export split takes "
                    "single exits)"
                )
            folder_of[adapter.exit_layer] = adapters.folder
            prefix = tensor_name(adapter.exit_layer, "")
            names = [name for name in adapters.weights.names() if name.startswith(prefix)]
            tensors |= {name: adapters.weights.get(name).contiguous() for name in sorted(names)}
    first = sets[0]
    training = first.training
    if any(dict(adapters.training) != dict(training) for adapters in sets):
        training = {f"exit_{a.exit_layer}": dict(each.training) for each in sets for a in each.adapters}
    described = sorted((a for adapters in sets for a in adapters.adapters), key=lambda a: a.exit_layer)
    named = first.base if base is None else replace(first.base, name=base)
    return AdapterSet(base=named, adapters=tuple(described), training=training), tensors


def _base_files(checkpoint: Checkpoint) -> list[Path]:
    """A model's files: all that are loaded, and its licence."""
    files = checkpoint.files
    source = checkpoint.hugging_face_folder
    if isinstance(files, GGUFFile):
        return sorted({entry.path for entry in files.container.tensors.values()} | {files.path})
    assert source is not None, "a checkpoint is a GGUF file or a folder"
    names = {path.name for pattern in (*PATTERNS, *OTHER_FILES) for path in source.glob(pattern) if path.is_file()}
    names -= {files.tuned_file.name, DESCRIPTION_FILE, WEIGHTS_FILE}  # adapters are written anew: never into a link
    return [source / name for name in sorted(names)]


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _result(adapters: AdapterSet, output: Path, folder: Path, linked: int, notes: Sequence[str]) -> AdapterExport:
    return AdapterExport(
        output=str(output),
        base=adapters.base.name,
        weights_hash=adapters.base.weights_hash,
        exits=tuple(adapter.exit_layer for adapter in adapters.adapters),
        num_linked=linked,
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        notes=tuple(notes),
    )
