"""Tensors of a GGUF file: their names, types and rows, from a checkpoint's.

The inverse of `layerskip.checkpoint.gguf.tensors`, whose tables it uses.

Shapes: O output width, I input width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape, quantize

from layerskip.checkpoint.gguf.tensors import conventions, file_names, order_of_pairs
from layerskip.checkpoint.loading.tensors import EMBEDDING, HEAD, TensorSource, read_tensor, tensor_shapes
from layerskip.export.weights import check_float16
from layerskip.model.config.model_config import ModelConfig

TYPES = {name: GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
"""Types of matrices by their names on the command line."""
TABLE_TYPES = {GGMLQuantizationType.Q4_0: GGMLQuantizationType.Q8_0}
"""Types of embedding and head where it is another one: four bits cost them more quality than other matrices."""


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the file."""

    name: str
    """In the file."""
    source: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int | None
    """Number of heads, where the rows of each are reordered into rotary pairs."""
    offset: float
    """Number added to the weights."""

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the bytes."""
        return tuple(quant_shape_to_byte_shape(self.shape, self.type))

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.byte_shape))


def plan_tensors(config: ModelConfig, type_: GGMLQuantizationType) -> list[PlannedTensor]:
    """All tensors of a model; a tied head is left out.

    Vectors are float32. A matrix whose rows aren't whole blocks is float16, as llama.cpp's own converter makes it.
    """
    raw = {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    names, rules = file_names(raw), conventions(raw)
    planned = []
    for source, shape in tensor_shapes(config).items():
        name = names[source]
        planned.append(
            PlannedTensor(
                name=name,
                source=source,
                shape=shape,
                type=_type(source, shape, type_),
                heads=(rules.pairs or {}).get(name.split(".")[-2]),
                offset=rules.norm_offset if name.endswith("norm.weight") else 0.0,
            )
        )
    return planned


def tensor_bytes(source: TensorSource, planned: Sequence[PlannedTensor]) -> Iterator[np.ndarray]:
    """The bytes of the planned tensors, one tensor in memory at a time."""
    for tensor in planned:
        numbers = read_tensor(source, tensor.source, tensor.shape).float()
        if tensor.type == GGMLQuantizationType.F16:
            check_float16({tensor.source: numbers})
        if tensor.heads is not None and tensor.shape[0] % (2 * tensor.heads) == 0:
            numbers = numbers[order_of_pairs(tensor.shape[0], tensor.heads).argsort()]
        if tensor.offset:
            numbers = numbers + tensor.offset
        yield quantize(numbers.contiguous().numpy(), tensor.type).view(np.uint8).reshape(tensor.byte_shape)


def _type(source: str, shape: tuple[int, ...], asked: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    type_ = TABLE_TYPES.get(asked, asked) if source in (EMBEDDING, HEAD) else asked
    size, _ = GGML_QUANT_SIZES[type_]
    return GGMLQuantizationType.F16 if shape[-1] % size else type_
