"""A checkpoint, or its first layers, as a GGUF file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.checkpoint.loading.tensors import TensorSource
from layerskip.errors import InvalidArgumentError
from layerskip.export.first_layers import adapter_notes, first_layers
from layerskip.export.gguf.config import (
    add_config,
    add_samplers,
    architecture_of,
    ignored_by_llama_cpp,
    rope_tensors,
)
from layerskip.export.gguf.tensors import TYPES, PlannedTensor, plan_tensors, tensor_bytes
from layerskip.export.gguf.tokenizer import tokenizer_keys
from layerskip.export.places import new_file

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
HEADER_BYTES = 32 << 20
"""Bytes set aside for metadata."""


@dataclass(frozen=True, kw_only=True)
class GGUFExport:
    """A GGUF file that was written."""

    output: str
    model: str
    """As the user called it."""
    architecture: str
    exit_layer: int
    """Layers in the file."""
    num_layers: int
    """L, the model's."""
    types: dict[str, int]
    """Number of tensors by type."""
    num_bytes: int
    notes: tuple[str, ...]


def export_gguf(
    checkpoint: Checkpoint, output: Path, *, exit_layer: int | None = None, type_name: str = "f16"
) -> GGUFExport:
    """Write a model, or its first layers with final norm and head, as a GGUF file.

    Args:
        checkpoint: The model, in any format.
        output: The file; it must not exist.
        exit_layer: E layers, 1..L; all if not given.
        type_name: Type of the matrices, a key of `TYPES`.

    Raises:
        InvalidArgumentError: There is no such exit or type, or `output` exists or can't be written.
        UnsupportedModelError: llama.cpp has no architecture for the family, or not with this configuration.
        CheckpointError: The model's files are damaged, its tokenizer can't be written, or the disk is full.
    """
    if type_name not in TYPES:
        raise InvalidArgumentError(f"type must be one of {', '.join(TYPES)}, got {type_name!r}")
    num_layers = checkpoint.config.num_layers
    _, config = first_layers(checkpoint, num_layers if exit_layer is None else exit_layer)
    architecture = architecture_of(config)
    notes = [*adapter_notes(checkpoint, exit_layer), *ignored_by_llama_cpp(config)]
    keys, remarks = tokenizer_keys(checkpoint, config)
    notes += remarks
    planned = plan_tensors(config, TYPES[type_name])
    with new_file(output, sum(tensor.num_bytes for tensor in planned) + HEADER_BYTES) as file:
        writer = GGUFWriter(file, architecture)
        writer.add_name(_name(checkpoint, exit_layer))
        writer.add_file_type(FILE_TYPES[type_name])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_config(writer, config)
        add_samplers(writer, checkpoint.generation_config)
        for key, value in keys.items():
            _add(writer, key, value)
        factors = rope_tensors(writer, config)
        _write_tensors(writer, factors, checkpoint.weights, planned)
        num_bytes = file.stat().st_size
    types = Counter([GGMLQuantizationType.F32.name] * len(factors)) + Counter(tensor.type.name for tensor in planned)
    return GGUFExport(
        output=str(output),
        model=checkpoint.name,
        architecture=architecture,
        exit_layer=config.num_layers,
        num_layers=num_layers,
        types=dict(types),
        num_bytes=num_bytes,
        notes=tuple(notes),
    )


def _write_tensors(
    writer: GGUFWriter, factors: Mapping[str, np.ndarray], source: TensorSource, planned: Sequence[PlannedTensor]
) -> None:
    """Write all that the writer has been given, then the tensors one by one, and close the file."""
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in planned:
        writer.add_tensor_info(
            tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.num_bytes, raw_dtype=tensor.type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for data in tensor_bytes(source, planned):
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key of the type that its value has."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _name(checkpoint: Checkpoint, exit_layer: int | None) -> str:
    """What llama.cpp calls the model: as its files or its folder are called."""
    own = checkpoint.files.container.metadata.get("general.name") if isinstance(checkpoint.files, GGUFFile) else None
    name = str(own or Path(checkpoint.name).name or checkpoint.name)
    return name if exit_layer is None else f"{name}, first {exit_layer} layers"
