"""The tensors of a checkpoint: their names and shapes, and how they are read, whole or in part.

Shapes: D width, V vocabulary, I width of the MLP, H and H_kv heads, D_head channels of a head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from layerskip.errors import WeightsError
from layerskip.model.blocks import BlockFormat, BlockWeight
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.native.joined import can_join

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SLICE_BYTES = 2**21
"""Bytes of float32 that are computed from a file's blocks at a time; it takes several times as much for a moment."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows or columns of a tensor: what one of several processes reads of a weight that they share."""

    dim: Literal[0, 1]
    """0: rows, a weight's outputs. 1: columns, a weight's inputs."""
    start: int
    """The first row or column, from 0."""
    stop: int
    """One past the last."""

    @classmethod
    def rows(cls, start: int, stop: int) -> "Part":
        """Outputs `start` to `stop - 1` of a weight, or elements of a bias."""
        return cls(0, start, stop)

    @classmethod
    def columns(cls, start: int, stop: int) -> "Part":
        """Inputs `start` to `stop - 1` of a weight."""
        return cls(1, start, stop)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `WeightsError` unless a tensor of this name and shape has these rows or columns."""
        if self.dim >= len(shape) or not 0 <= self.start < self.stop <= shape[self.dim]:
            kind = "rows" if self.dim == 0 else "columns"
            raise WeightsError(
                f"tensor {name!r} has shape {shape}, and {kind} {self.start} to {self.stop - 1} were asked for; "
                "config.json doesn't describe the checkpoint's tensors"
            )

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part's own shape, of a tensor of this shape."""
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the numbers that `get` returns."""
    num_bytes: int
    """Bytes in the file."""
    mapped: bool
    """Whether `get` returns the file's own pages, not what is computed from them."""
    blocks_mapped: bool = False
    """Whether `blocks` does."""


class TensorSource(Protocol):
    """Tensors by name, on the CPU, in the dtype of the file."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """What is known of a tensor without reading it."""
        ...

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns.

        If the tensor is memory-mapped, then by a mapping of its own, so that its pages go when it does. Of a part, no
        other bytes are read, apart from those in the same blocks (of quantized numbers) and in the same pages of the
        file.

        Raises:
            WeightsError: The tensor doesn't have such a part.
        """
        ...

    def block_format(self, name: str) -> BlockFormat | None:
        """The blocks that hold the tensor's numbers exactly, where the file has it in such; None elsewhere."""
        ...

    def blocks(self, name: str, part: Part | None = None) -> BlockWeight:
        """A tensor that has a `block_format`, or some of its rows or columns, in these blocks.

        Raises:
            WeightsError: The tensor doesn't have such a part, or the part would cut blocks.
        """
        ...


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must have."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        prefix, sparse = f"model.layers.{index}.", index in config.sparse_layers
        for ours, theirs in stored_weights(config, sparse=sparse).items():
            for name, shape in zip(theirs, stored_shapes(config, ours, len(theirs)), strict=True):
                shapes[f"{prefix}{name}.weight"] = shape
                if has_bias(config, ours):
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
        for expert in range(config.num_experts if sparse else 0):
            for ours, theirs in expert_weights(config, expert).items():
                for name, shape in zip(theirs, stored_shapes(config, ours, len(theirs), expert=True), strict=True):
                    shapes[f"{prefix}{name}.weight"] = shape
    return shapes


def stored_weights(config: ModelConfig, *, sparse: bool) -> Mapping[str, tuple[str, ...]]:
    """Our name of a layer's weight -> the checkpoint's tensors of it; `sparse`: of a layer with experts, but theirs."""
    family = FAMILIES[config.model_type]
    if not sparse:
        return family.weights
    assert family.experts is not None
    others = {ours: theirs for ours, theirs in family.weights.items() if ours not in ("gate_up", "down")}
    return {**others, "router": (family.experts.router,)}


def expert_weights(config: ModelConfig, expert: int) -> Mapping[str, tuple[str, ...]]:
    """Our name of an expert's weight -> the checkpoint's tensors of it."""
    names = FAMILIES[config.model_type].experts
    assert names is not None
    weights = {"gate_up": names.gate_up, "down": names.down}
    return {ours: tuple(name.format(expert) for name in theirs) for ours, theirs in weights.items()}


def stored_shapes(config: ModelConfig, ours: str, parts: int, *, expert: bool = False) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors (`parts` of them) that a checkpoint has for one of our weights, or of an expert's."""
    width, inner = config.hidden_size, config.moe_intermediate_size if expert else config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    match ours:
        case "qkv":
            return ((q, width), (kv, width), (kv, width)) if parts == 3 else ((q + 2 * kv, width),)
        case "o":
            return ((width, q),)
        case "gate_up":
            return ((inner, width),) * 2 if parts == 2 else ((2 * inner, width),)
        case "down":
            return ((width, inner),)
        case "router":
            return ((config.num_experts, width),)
        case "q_norm":
            return ((q if config.joint_qk_norm else config.head_dim,),)
        case "k_norm":
            return ((kv if config.joint_qk_norm else config.head_dim,),)
        case _:
            return ((width,),)


def has_bias(config: ModelConfig, ours: str) -> bool:
    """Whether a layer's matrix has a bias."""
    switches = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    return switches.get(ours, False)


def kept_formats(
    source: TensorSource, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[BlockFormat, ...] | None:
    """The blocks in which native kernels keep the tensors of one of our weights.

    Args:
        source: The checkpoint's tensors.
        ours: Our name of the weight; or `head`.
        names: The tensors that make it up.
        shapes: [O, I] of each.

    Returns:
        A format for each tensor; None if one of them is in no blocks, or if tensors of several formats can't be joined.
    """
    found = [source.block_format(name) for name in names]
    formats = tuple(format_ for format_ in found if format_ is not None)
    if len(formats) < len(found):
        return None
    outputs = [shape[0] for shape in shapes]
    one = len(set(formats)) == 1
    return formats if one or can_join(outputs, alternate=ours == "gate_up") else None


def parameter_count(config: ModelConfig) -> int:
    """Weights of a network; a tied head counts once."""
    return sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())


def with_own_head(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """The configuration that the tensors are of: a head that differs from the embedding isn't tied to it.

    Files say `tie_word_embeddings` and have a head of their own all the same. transformers compares the tensors, and
    uses a head that differs.
    """
    if not config.tie_word_embeddings or not {EMBEDDING, HEAD} <= source.names():
        return config
    first = Part.rows(0, 1)  # differs where anything does, in all but a few checkpoints
    for part in (first, None):
        if not torch.equal(source.get(HEAD, part), source.get(EMBEDDING, part)):
            return replace(config, tie_word_embeddings=False)
    return config


def check_names(config: ModelConfig, names: Iterable[str]) -> None:
    """Raise `WeightsError` unless the checkpoint has exactly the tensors that the network uses."""
    present = set(names)
    if config.num_layers > len(present):  # before a list of that many layers' tensors is made
        raise WeightsError(
            f"the checkpoint has {len(present)} tensors, too few for the {config.num_layers} layers of config.json; "
            "its files are incomplete, or config.json doesn't describe them"
        )
    expected = set(tensor_shapes(config))
    missing = sorted(expected - present)
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
            "its files are incomplete, or config.json doesn't describe them"
        )
    unknown = sorted(n for n in present - expected if n != HEAD and not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise WeightsError(
            f"the checkpoint has {len(unknown)} tensors that a {config.model_type!r} model with this config.json "
            f"doesn't use, first {unknown[0]!r}; config.json doesn't describe them"
        )


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise `WeightsError` unless a tensor has the shape that the configuration asks for."""
    if shape != wanted:
        raise WeightsError(f"tensor {name!r} has shape {shape}; config.json asks for {wanted}")


def read_tensor(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of floating-point numbers in the shape that the configuration asks for.

    Raises:
        WeightsError: It has another shape, or whole numbers.
    """
    tensor = source.get(name)
    check_shape(name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point():
        raise WeightsError(f"tensor {name!r} has dtype {tensor.dtype}; weights must be floating point")
    return tensor


def read_table(source: TensorSource, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | BlockWeight:
    """The embedding table, of which rows are looked up: mapped where the file has numbers or blocks that can be.

    Args:
        source: The checkpoint's tensors.
        shape: (V, D).
        dtype: Of a table that has to be computed.
    """
    stored = source.stored(EMBEDDING)
    if stored.mapped:
        return read_tensor(source, EMBEDDING, shape)
    if stored.blocks_mapped:
        weight = source.blocks(EMBEDDING)
        check_shape(EMBEDDING, weight.shape, shape)
        return weight
    table = torch.empty(shape, dtype=dtype)
    fill(table, source, EMBEDDING, shape)
    return table


def fill(place: Tensor, source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    """Copy a matrix [O, I] into its place; what is computed from a file's blocks is never there as a whole.

    Raises:
        WeightsError: As `read_tensor`.
    """
    stored = source.stored(name)
    if stored.mapped or stored.shape != shape or len(shape) != 2:
        place.copy_(read_tensor(source, name, shape))
        return
    rows = max(1, SLICE_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        place[start:stop].copy_(source.get(name, Part.rows(start, stop)))
