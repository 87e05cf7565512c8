"""Some of a checkpoint's tensors as safetensors files: linked where a file consists of them, else written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerskip.checkpoint.loading.tensors import Part, TensorSource
from layerskip.checkpoint.safetensors import INDEX_FILE, WEIGHTS_FILE, SafetensorsFiles
from layerskip.errors import InvalidArgumentError
from layerskip.export.places import is_elsewhere, link_or_copy

MAX_FILE = 4 << 30
"""Bytes of a written file, at most, unless a tensor is larger: its tensors are in memory together."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file with weights."""

    tensors: Mapping[str, int]
    """Bytes of each tensor, by name."""
    source: Path | None
    """The file with exactly these tensors; None: none, so it is written."""


def plan_files(
    weights: TensorSource, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> list[WeightFile]:
    """The files that some of a checkpoint's tensors make.

    Args:
        weights: The checkpoint's tensors.
        shapes: Name and shape of each tensor that is wanted.
        dtype: Type of the weights; None: their own.
    """
    sizes = {name: torch.Size(shape).numel() * _dtype(weights, name, dtype).itemsize for name, shape in shapes.items()}
    if not isinstance(weights, SafetensorsFiles):
        return [WeightFile(tensors=part, source=None) for part in _parts(sizes)]
    files: list[WeightFile] = []
    for path, names in weights.by_file().items():
        kept = {name: sizes[name] for name in sorted(names) if name in sizes}
        changed = len(kept) < len(names) or any(_dtype(weights, name, None) != dtype for name in kept if dtype)
        if kept and not changed:
            files.append(WeightFile(tensors=kept, source=path))
        else:
            files += [WeightFile(tensors=part, source=None) for part in _parts(kept)]
    return files


def write_files(weights: TensorSource, files: Sequence[WeightFile], folder: Path, dtype: torch.dtype | None) -> int:
    """Write or link the planned files, and their index if there are several.

    Returns:
        Number of files that are links.
    """
    from safetensors.torch import save_file

    linked = 0
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        if file.source is not None:
            linked += link_or_copy(file.source, folder / name)
        else:
            tensors = {key: weights.get(key) for key in file.tensors}
            if dtype == torch.float16:
                check_float16(tensors)
            converted = {key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}
            save_file(converted, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(file.tensors, name)
    if len(files) > 1:
        total = sum(sum(file.tensors.values()) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return linked


def check_float16(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `InvalidArgumentError` if a tensor has a number that would become infinite in float16."""
    most = torch.finfo(torch.float16).max
    for name, tensor in tensors.items():
        largest = float(tensor.abs().max())
        if largest > most:
            raise InvalidArgumentError(
                f"tensor {name!r} has a number of {largest:.3g}, and float16 has none beyond {most:.0f}; take bfloat16 "
                "or float32"
            )


def bytes_to_write(files: Sequence[WeightFile], output: Path) -> int:
    """Bytes of the planned files that can't be links in `output`."""
    written = [file for file in files if file.source is None or is_elsewhere(file.source, output)]
    return sum(sum(file.tensors.values()) for file in written)


def _dtype(weights: TensorSource, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """Type that a tensor gets: a given one, or its own."""
    return weights.get(name, Part.rows(0, 1)).dtype if dtype is None else dtype


def _parts(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Tensors in groups of `MAX_FILE` bytes at most."""
    part: dict[str, int] = {}
    for name, size in sizes.items():
        if part and sum(part.values()) + size > MAX_FILE:
            yield part
            part = {}
        part[name] = size
    if part:
        yield part
