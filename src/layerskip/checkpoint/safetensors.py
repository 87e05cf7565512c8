"""Tensors of safetensors files, one or many, each read through a mapping of its own."""

from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Never

import torch
from torch import Tensor

from layerskip.checkpoint.contents import Contents, share_of_types
from layerskip.checkpoint.json_file import read_json
from layerskip.checkpoint.loading.tensors import Part, StoredTensor
from layerskip.errors import WeightsError, brief
from layerskip.files import parse_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONVERT = "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
FOREIGN = {
    (
        ".safetensors",
    ): f"only {WEIGHTS_FILE}, or the files that {INDEX_FILE} names, are read: rename it if it is the model",
    (".gguf",): "name that file, or a folder in which it is the only one",
    (".bin", ".pt", ".pth", ".ckpt"): f"pickled weights can run code when they are read; {CONVERT}",
    (".npz", ".msgpack", ".h5", ".onnx", ".tflite"): f"these are weights of another framework; {CONVERT}",
}
"""By the endings of files that hold weights in other forms: what to do with them."""
MOST_HEADER_BYTES = 10**8
"""Bytes that a header may have, as in the library."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors, by their names in a header."""


class SafetensorsFiles:
    """Tensors by name from one or more safetensors files, memory-mapped (`model.weights.TensorSource`)."""

    def __init__(self, files: dict[str, Path | None]) -> None:
        """Read the files' headers.

        Args:
            files: File of each tensor; or one entry `"": file` whose tensors are all taken.

        Raises:
            WeightsError: A file is missing, truncated or not safetensors, or lacks a tensor that the index names.
        """
        self._file_of: dict[str, Path] = {}
        self._stored: dict[str, StoredTensor] = {}
        paths = {path for path in files.values() if path is not None}
        present = {path: _read_header(path) for path in sorted(paths)}
        if "" in files:
            self._file_of = {name: path for path in paths for name in present[path]}
            self._stored = {name: stored for header in present.values() for name, stored in header.items()}
            return
        for name, path in files.items():
            if path is None or name not in present[path]:
                raise WeightsError(f"the index names tensor {name!r} in {path}, which doesn't have it")
            self._file_of[name] = path
            self._stored[name] = present[path][name]

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def by_file(self) -> dict[Path, list[str]]:
        """Names of the tensors in each file, files in the order of their names."""
        names: dict[Path, list[str]] = {path: [] for path in sorted(set(self._file_of.values()))}
        for name, path in self._file_of.items():
            names[path].append(name)
        return names

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        return self._stored[name]

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns, in a mapping of its own.

        Tensors that are read through one handle share a mapping of the whole file, and the pages of those that were
        copied long ago would stay resident until the last of them goes.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file_of[name]
        if part is not None:
            part.check(name, self._stored[name].shape)
        try:
            with safe_open(path, framework="pt") as file:
                if part is None:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
                stored, wanted = file.get_slice(name), slice(part.start, part.stop)
                some: Tensor = stored[wanted] if part.dim == 0 else stored[:, wanted]
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        return some

    def block_format(self, name: str) -> None:
        """None: this format has no blocks."""

    def blocks(self, name: str, part: Part | None = None) -> Never:
        """Nothing has blocks."""
        raise AssertionError(name)

    def contents(self) -> Contents:
        """Bytes of the files, and of the tensors by type."""
        paths = sorted(set(self._file_of.values()))
        return Contents(
            format="safetensors",
            num_bytes=sum(path.stat().st_size for path in paths),
            types=share_of_types(
                (str(stored.dtype).removeprefix("torch."), stored.num_bytes) for stored in self._stored.values()
            ),
        )


def find_weight_files(folder: Path) -> dict[str, Path | None]:
    """Which safetensors file holds which tensor (`""` for all, where there is one file).

    Raises:
        WeightsError: No safetensors, only pickles, a broken index, or a shard that is missing.
    """
    if (folder / WEIGHTS_FILE).is_file():  # where there are both, transformers takes this one too
        return {"": folder / WEIGHTS_FILE}
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WeightsError(f"{index} has no 'weight_map' of tensors to files; download the checkpoint again")
        outside = sorted(file for file in weight_map.values() if not _lies_inside(file))
        if outside:
            raise WeightsError(
                f"{index} names the file {outside[0]!r}, which isn't in its folder; an index may name files beside it "
                "only: download the checkpoint again, from a source that you trust"
            )
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise WeightsError(f"{len(missing)} weight files named by {index} are missing, first {missing[0]!r}")
        return {name: folder / file for name, file in weight_map.items()}
    raise WeightsError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{instead(folder)}")


def _lies_inside(name: str) -> bool:
    """Whether an index's entry names a file in the index's folder or below it.

    The names count, not where links lead: an index comes from elsewhere, and links are made on this machine (the hub's
    cache consists of them).
    """
    return not (
        PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name or ".." in Path(name).parts
    )


def instead(folder: Path) -> str:
    """What a folder has in place of what was looked for, and what to do with it; for the end of an error."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name.startswith("adapter_") for name in names):
        return (
            "; it holds an adapter only (adapter_config.json): load its base model with peft, merge_and_unload(), and "
            "save the result with save_pretrained"
        )
    for suffixes, advice in FOREIGN.items():
        foreign = [name for name in names if name.endswith(suffixes)]
        if foreign:
            return f"; there is {foreign[0]!r}: {advice}"
    return ""


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors, of which none is read or mapped: the library maps whole files, however large they are."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size - 8 - length
            if not 0 < length <= MOST_HEADER_BYTES or total < 0:
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header isn't an object")
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry) for name, entry in header.items()}
        if sum(tensor.num_bytes for tensor in tensors.values()) != total:
            raise ValueError(f"{total} bytes of tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    return tensors


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} can't be read as safetensors ({brief(error)}); it is truncated or not in that format: download it "
        "again"
    )


def _stored(path: Path, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    """A tensor of a header."""
    if entry["dtype"] not in DTYPES:
        raise WeightsError(
            f"{path}: tensor {name!r} is of type {entry['dtype']}, which can't be read; known types: "
            f"{', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    num_bytes = prod(shape) * dtype.itemsize
    if not all(isinstance(size, int) and size >= 0 for size in shape) or last - first != num_bytes:
        raise ValueError(f"tensor {name!r} of shape {shape} in {last - first} bytes")
    return StoredTensor(shape=shape, dtype=dtype, num_bytes=num_bytes, mapped=True)
