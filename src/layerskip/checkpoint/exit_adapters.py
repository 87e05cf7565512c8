"""Exit adapters on disk: `exit_adapters.json` describes them, `exit_adapters.safetensors` holds their weights.

The files may lie beside the model's own, where transformers and other engines ignore them, or anywhere else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerskip.checkpoint.json_file import read_json
from layerskip.checkpoint.loading.adapters import FORMAT, AdapterDescription, AdapterSet, BaseModel
from layerskip.checkpoint.safetensors import SafetensorsFiles
from layerskip.errors import CheckpointError
from layerskip.files import to_json

DESCRIPTION_FILE, WEIGHTS_FILE = "exit_adapters.json", "exit_adapters.safetensors"


def has_adapters(folder: Path) -> bool:
    """Whether a folder holds exit adapters."""
    return (folder / DESCRIPTION_FILE).is_file()


def read_adapters(folder: Path) -> AdapterSet:
    """The adapters in a folder; their weights aren't read yet.

    Raises:
        CheckpointError: There are none, they are a later version's, or the file isn't what `layerskip train` writes.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no exit adapters ({DESCRIPTION_FILE}); name the folder that layerskip train --exit-adapters "
            "wrote, or leave them out"
        )
    content = read_json(file)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(f"{file} has format {version}, and this version reads up to {FORMAT}; upgrade layerskip")
    try:
        adapters = tuple(_adapter(dict(entry)) for entry in content["adapters"])
        base = BaseModel(**content["base"])
        training = dict(content.get("training", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} isn't what layerskip train writes ({error!r}); train the adapters anew"
        ) from error
    exits = [adapter.exit_layer for adapter in adapters]
    _check_types(file, base, adapters)
    twice = next((exit_layer for exit_layer in exits if exits.count(exit_layer) > 1), None)
    if twice is not None:
        raise CheckpointError(f"{file} has two adapters for exit {twice}; an exit has one at most: delete the other")
    if not exits:
        raise CheckpointError(f"{file} names no adapter; train some with layerskip train --exit-adapters")
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder} has {DESCRIPTION_FILE} and no {WEIGHTS_FILE}; copy both")
    weights = SafetensorsFiles({"": folder / WEIGHTS_FILE})
    return AdapterSet(base=base, adapters=adapters, training=training, folder=folder, weights=weights)


def _adapter(entry: dict[str, Any]) -> AdapterDescription:
    seen = tuple((int(agreed), int(tokens)) for agreed, tokens in entry.pop("by_confidence", ()))
    layers = tuple(int(layer) for layer in entry.pop("value_layers", ()))
    return AdapterDescription(**entry, by_confidence=seen, value_layers=layers)


def write_adapters(folder: Path, adapters: AdapterSet, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write both files; the description comes last, so that a folder that has it is complete."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / DESCRIPTION_FILE).write_text(to_json(adapters.to_json(), indent=2) + "\n", encoding="utf-8")


def _check_types(file: Path, base: BaseModel, adapters: Sequence[AdapterDescription]) -> None:
    sizes = [(name, getattr(base, name)) for name in ("num_layers", "hidden_size", "vocab_size")]
    sizes += [("exit_layer", adapter.exit_layer) for adapter in adapters]
    sizes += [("vocabulary_size", a.vocabulary_size) for a in adapters if a.vocabulary_size is not None]
    for name, value in sizes:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{file}: {name} must be a whole number from 1 on, got {value!r}")
