"""The container of a GGUF file: metadata, and the place of each tensor.

Every count, length and offset is checked against the bytes of the file before anything of that size is allocated, so a
truncated or forged file ends in one error.

Source: the GGUF specification, versions 2 and 3.
"""

import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from layerskip.errors import CheckpointError, WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME = 256
"""Characters of a key or of a tensor's name, at most; real ones have up to about 60."""
MAX_NESTING = 2
"""Levels of nested arrays, at most; real files have none."""

_SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "B",
}
"""Codes of scalar types that `struct` and numpy share."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor, and its place in the file."""

    path: Path
    """The file with the tensor."""
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Shape in torch's order: outputs first, inputs last."""
    offset: int
    """Bytes from the beginning of the file."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Container:
    """The header of a file, or of all files of a model; tensors are read on request."""

    path: Path
    """The file, or the first one."""
    version: int
    num_bytes: int
    """Bytes of the whole file, or of all files."""
    metadata: Mapping[str, Any]
    """Values of metadata: numbers, booleans, texts, lists of texts, and numpy arrays of numbers."""
    tensors: Mapping[str, TensorEntry]

    def plain_metadata(self) -> dict[str, Any]:
        """The metadata with lists instead of arrays."""
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in self.metadata.items()}


def read_container(path: Path) -> Container:
    """Read a file's header.

    Raises:
        CheckpointError: The file can't be opened, isn't a GGUF file of a supported version, or has damaged metadata.
        WeightsError: Tensors overlap, have the same name, or are outside the file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).container()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:  # an empty file can't be mapped
        raise CheckpointError(f"{path} is not a GGUF file: it is empty") from error


def join(parts: Sequence[Container]) -> Container:
    """Join the files of a model; the first has the metadata.

    Raises:
        WeightsError: Two files have the same tensor.
    """
    tensors: dict[str, TensorEntry] = {}
    for part in parts:
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise WeightsError(f"{part.path} has tensor {twice[0]!r}, and so has {tensors[twice[0]].path}")
        tensors.update(part.tensors)
    return replace(parts[0], tensors=tensors, num_bytes=sum(part.num_bytes for part in parts))


class _Reader:
    """A position in the file that only moves forward."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._place, self._end = path, content, 0, len(content)

    def container(self) -> Container:
        version = self._version()
        num_tensors, num_keys = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._name("the name of a key")
            if key in metadata:
                raise self._damaged(f"it has the key {key!r} twice")
            metadata[key] = self._value(self._number("I", f"the type of {key!r}"), key, MAX_NESTING)
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment must be a power of two, got {alignment!r}")
        return Container(
            path=self._path,
            version=version,
            num_bytes=self._end,
            metadata=metadata,
            tensors=self._place_tensors(entries, alignment),
        )

    def _version(self) -> int:
        magic = self._take(4, "its first bytes")
        if magic != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}")
        version: int = self._number("I", "its version")
        if version in VERSIONS:
            return version
        if version and version & 0xFFFF == 0:
            raise CheckpointError(f"{self._path} is a big-endian GGUF file; only little-endian ones can be read")
        raise CheckpointError(
            f"{self._path} is a GGUF file of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read: "
            "convert the model again, or update layerskip if the file is newer than it"
        )

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("the name of a tensor")
        dimensions = self._number("I", f"the dimensions of tensor {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions", WeightsError)
        shape = [self._number("Q", f"the shape of tensor {name!r}") for _ in range(dimensions)]
        kind = self._number("I", f"the type of tensor {name!r}")
        return name, tuple(reversed(shape)), kind, self._number("Q", f"the place of tensor {name!r}")

    def _place_tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, TensorEntry]:
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._damaged(f"it has tensor {name!r} twice", WeightsError)
            if kind not in GGMLQuantizationType._value2member_map_:
                raise self._damaged(f"tensor {name!r} is of type {kind}, which GGUF doesn't have", WeightsError)
            type_ = GGMLQuantizationType(kind)
            num_bytes = self._tensor_bytes(name, shape, type_)
            if offset % alignment:
                raise self._damaged(f"tensor {name!r} isn't aligned to {alignment} bytes", WeightsError)
            if start + offset + num_bytes > self._end:
                raise self._damaged(
                    f"tensor {name!r} ends at byte {start + offset + num_bytes}, and the file at {self._end}",
                    WeightsError,
                )
            tensors[name] = TensorEntry(
                path=self._path, name=name, type=type_, shape=shape, offset=start + offset, num_bytes=num_bytes
            )
        self._check_overlap(tensors)
        return tensors

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], type_: GGMLQuantizationType) -> int:
        weights, size = GGML_QUANT_SIZES[type_]
        if any(length < 1 for length in shape) or shape[-1] % weights:
            raise self._damaged(
                f"tensor {name!r} of type {type_.name} has shape {shape}; lengths must be positive, and the last one a "
                f"multiple of {weights}",
                WeightsError,
            )
        return prod(shape) // weights * size

    def _check_overlap(self, tensors: Mapping[str, TensorEntry]) -> None:
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(in_order):
            if before.offset + before.num_bytes > after.offset:
                raise self._damaged(f"tensors {before.name!r} and {after.name!r} overlap", WeightsError)

    def _value(self, kind: int, key: str, nesting: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text(f"the value of {key!r}")
        if kind == GGUFValueType.ARRAY:
            return self._array(key, nesting)
        if kind not in _SCALARS:
            raise self._damaged(f"{key!r} has a value of type {kind}, which GGUF doesn't have")
        number = self._number(_SCALARS[kind], f"the value of {key!r}")
        return bool(number) if kind == GGUFValueType.BOOL else number

    def _array(self, key: str, nesting: int) -> Any:
        kind = self._number("I", f"the type of {key!r}")
        count = self._number("Q", f"the length of {key!r}")
        if kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[kind]}")
            values = np.frombuffer(self._take(count * dtype.itemsize, f"the values of {key!r}"), dtype)
            return values.astype(bool) if kind == GGUFValueType.BOOL else values
        if kind == GGUFValueType.ARRAY and nesting == 0:
            raise self._damaged(f"{key!r} has arrays within arrays within arrays")
        least = 8 if kind == GGUFValueType.STRING else 12  # bytes of one element, at least
        self._check_room(count * least, f"the values of {key!r}")
        read: Callable[[], Any] = (
            (lambda: self._text(f"a value of {key!r}"))
            if kind == GGUFValueType.STRING
            else (lambda: self._value(kind, key, nesting - 1))
        )
        return [read() for _ in range(count)]

    def _name(self, what: str) -> str:
        name = self._text(what)
        if not 1 <= len(name) <= MAX_NAME:
            raise self._damaged(f"{what} has {len(name)} characters; allowed are 1 to {MAX_NAME}")
        return name

    def _text(self, what: str) -> str:
        content = self._take(self._number("Q", what), what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 ({error.reason})") from error

    def _number(self, code: str, what: str) -> Any:
        """The next number: I for counts of four bytes, Q for eight, or any code of `_SCALARS`."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self._take(size, what))[0]

    def _take(self, size: int, what: str) -> bytes:
        self._check_room(size, what)
        taken = self._content[self._place : self._place + size]
        self._place += size
        return taken

    def _check_room(self, size: int, what: str) -> None:
        if size > self._end - self._place:
            raise self._damaged(
                f"{what} should take {size} bytes from byte {self._place} on, and the file has {self._end}"
            )

    def _damaged(self, why: str, error: type[CheckpointError] = CheckpointError) -> CheckpointError:
        return error(f"{self._path} is damaged, or was cut short: {why}; download or convert it again")
