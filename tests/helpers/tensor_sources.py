"""Random tensors of a tiny model in memory, as a source of weights; for tests."""

from typing import Any, Never

import torch
from torch import Tensor

from layerskip.checkpoint.loading.tensors import Part, StoredTensor, tensor_shapes
from layerskip.model.config.families import parse_config
from layerskip.model.config.model_config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}


class Tensors:
    """Tensors in memory (`checkpoint.loading.tensors.TensorSource`), counting what is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: list[str] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def stored(self, name: str) -> StoredTensor:
        tensor = self.tensors[name]
        return StoredTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, num_bytes=tensor.nbytes, mapped=True)

    def get(self, name: str, part: Part | None = None) -> Tensor:
        self.read.append(name)
        tensor = self.tensors[name]
        return tensor if part is None else tensor.narrow(part.dim, part.start, part.stop - part.start)

    def block_format(self, name: str) -> None:
        """None has blocks."""

    def blocks(self, name: str, part: Part | None = None) -> Never:
        raise AssertionError(name)


def make_source(model_type: str = "llama", **changes: Any) -> tuple[ModelConfig, Tensors]:
    raw = {"model_type": model_type, **SIZES, **changes}
    if model_type in ("llama", "olmo2", "granite"):
        raw.pop("sliding_window")
    config = parse_config(raw)
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(config)
    return config, Tensors({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
