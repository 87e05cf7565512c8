"""A GGUF file's tensors under Hugging Face's names and in its order of rows.

Shapes: O output width, I input width.
"""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from layerskip.checkpoint.gguf.container import Container, TensorEntry
from layerskip.checkpoint.loading.tensors import Part, StoredTensor
from layerskip.errors import WeightsError
from layerskip.model.blocks import BLOCK_BYTES, BlockFormat, BlockWeight
from layerskip.model.config.families import FAMILIES, parse_config

TYPES = tuple(
    GGMLQuantizationType[name]
    for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL".split()
)
"""Types that can be read."""
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_KEPT: Mapping[GGMLQuantizationType, BlockFormat] = {
    GGMLQuantizationType.Q8_0: "q8_0",
    GGMLQuantizationType.Q4_0: "q4_0",
    GGMLQuantizationType.Q4_1: "q4_1",
    GGMLQuantizationType.Q5_0: "q5_0",
    GGMLQuantizationType.Q5_1: "q5_1",
    GGMLQuantizationType.Q4_K: "q4_k",
    GGMLQuantizationType.Q5_K: "q5_k",
    GGMLQuantizationType.Q6_K: "q6_k",
}

# Hugging Face's name of a layer's weight -> the file's name.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED_NAMES = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "phi3": _FUSED_NAMES,
    "gemma3_text": _GEMMA_NAMES,
    "olmo2": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
"""By family: names that differ from `_LAYER_NAMES`."""
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that `config.py` reads."""


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Differences between a family's tensors in the file and Hugging Face's."""

    names: Mapping[str, str]
    """Hugging Face's name of a layer's weight -> the file's name."""
    norm_offset: float = 0.0
    """Number that the file adds to the weights of norms."""
    pairs: Mapping[str, int] | None = None
    """Weights whose rows have the two channels of a rotary pair side by side -> their number of heads; Hugging Face has
    the first channels of all pairs before the second ones."""


def conventions(raw_config: Mapping[str, Any]) -> Conventions:
    """The conventions of the family of a config.json."""
    model_type = raw_config["model_type"]
    others = dict(_OTHER_NAMES.get(model_type, {}))
    experts = FAMILIES[model_type].experts
    if experts is not None:
        others[experts.router] = "ffn_gate_inp"
    pairs = None
    if model_type in ("llama", "mistral", "mixtral", "granite", "smollm3"):
        pairs = {"attn_q": raw_config["num_attention_heads"], "attn_k": raw_config["num_key_value_heads"]}
    return Conventions(
        names={**_LAYER_NAMES, **others}, norm_offset=1.0 if model_type == "gemma3_text" else 0.0, pairs=pairs
    )


def expert_names(raw_config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The file's name of a part of all experts of a layer -> Hugging Face's name of that part of each of them."""
    names = FAMILIES[raw_config["model_type"]].experts
    if names is None:
        return {}
    config = parse_config(raw_config)
    parts = {"ffn_gate_exps": names.gate_up[0], "ffn_up_exps": names.gate_up[1], "ffn_down_exps": names.down[0]}
    return {
        f"blk.{layer}.{theirs}.weight": [
            f"model.layers.{layer}.{ours.format(expert)}.weight" for expert in range(config.num_experts)
        ]
        for layer in sorted(config.sparse_layers)
        for theirs, ours in parts.items()
    }


def split_experts(entry: TensorEntry, count: int) -> list[TensorEntry]:
    """The matrices of `count` experts, which lie one after the other in a tensor.

    Raises:
        WeightsError: The tensor has another shape.
    """
    if len(entry.shape) != 3 or entry.shape[0] != count:
        raise WeightsError(
            f"{entry.path}: tensor {entry.name!r} has shape {entry.shape}; it should be matrices of {count} experts"
        )
    size = entry.num_bytes // count
    return [
        replace(entry, shape=entry.shape[1:], offset=entry.offset + expert * size, num_bytes=size)
        for expert in range(count)
    ]


class GGUFTensors:
    """A file's tensors by Hugging Face's names, memory-mapped (a `TensorSource`)."""

    def __init__(self, container: Container, raw_config: Mapping[str, Any]) -> None:
        """Match the names.

        Args:
            container: The file.
            raw_config: The model's config.json.

        Raises:
            WeightsError: The family has no such tensor, or its type can't be read.
        """
        self._conventions = conventions(raw_config)
        self._entries: dict[str, TensorEntry] = {}
        names = {theirs: ours for ours, theirs in file_names(raw_config).items()}
        experts = expert_names(raw_config)
        for theirs, entry in container.tensors.items():
            if theirs in ROPE_TENSORS:
                continue
            if theirs in experts:
                check_type(entry)
                single = split_experts(entry, len(experts[theirs]))
                self._entries.update(zip(experts[theirs], single, strict=True))
                continue
            if theirs not in names:
                raise WeightsError(
                    f"{entry.path} has a tensor {theirs!r}, which a {raw_config['model_type']!r} model of "
                    f"{raw_config['num_hidden_layers']} layers doesn't use"
                )
            check_type(entry)
            self._entries[names[theirs]] = entry

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._entries)

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        entry = self._entries[name]
        shifted = bool(self._conventions.norm_offset) and entry.name.endswith("norm.weight")
        in_order = self._order(entry) is None
        return StoredTensor(
            shape=entry.shape,
            dtype=torch.float32 if shifted else _PLAIN.get(entry.type, torch.float32),
            num_bytes=entry.num_bytes,
            mapped=entry.type in _PLAIN and in_order and not shifted,
            blocks_mapped=block_format(entry) is not None and entry.type in _KEPT and in_order,
        )

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns: as in the file if it is plain, else dequantized to float32."""
        entry = self._entries[name]
        stored, order = self._place(name, part)
        tensor = read_tensor(entry, stored)
        if order is not None:
            tensor = tensor[order]
        if self._conventions.norm_offset and entry.name.endswith("norm.weight"):
            tensor = tensor.float() - self._conventions.norm_offset
        return tensor

    def block_format(self, name: str) -> BlockFormat | None:
        """Format of blocks with exactly the tensor's numbers, its own or a wider one; None if there is none."""
        return block_format(self._entries[name])

    def blocks(self, name: str, part: Part | None = None) -> BlockWeight:
        """A tensor that has a `block_format`, or some of its rows or columns, in these blocks."""
        size, _ = GGML_QUANT_SIZES[self._entries[name].type]
        if part is not None and part.dim == 1 and (part.start % size or part.stop % size):
            raise WeightsError(
                f"tensor {name!r} is in blocks of {size} columns, and columns {part.start} to {part.stop - 1} would "
                f"cut them; take a multiple of {size}, or the tensor's numbers without blocks"
            )
        stored, order = self._place(name, part)
        weight = read_blocks(self._entries[name], stored)
        return weight if order is None else weight.rows(order)

    def _place(self, name: str, part: Part | None) -> tuple[Part | None, Tensor | None]:
        """Which part of the file's tensor to read, and the order in which its rows make up the part that is wanted.

        Rows that lie in another order in the file stay within their head, so that a part of them is read in the heads
        that it touches. The order is None where it is the file's.
        """
        entry = self._entries[name]
        if part is not None:
            part.check(name, entry.shape)
        order = self._order(entry)
        if order is None or part is None or part.dim == 1:
            return part, order
        rows = order[part.start : part.stop]
        first = int(rows.min())
        return Part.rows(first, int(rows.max()) + 1), rows - first

    def _order(self, entry: TensorEntry) -> Tensor | None:
        """Rows in Hugging Face's order, where the file has another one."""
        heads = (self._conventions.pairs or {}).get(entry.name.split(".")[-2])
        rows = entry.shape[0]
        return None if heads is None or rows % (2 * heads) else order_of_pairs(rows, heads)


def order_of_pairs(rows: int, heads: int) -> Tensor:
    """[rows] for each row in Hugging Face's order, its place in the file, which has the channels of a pair in a row."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def file_names(raw_config: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's name of every tensor that a model may have -> the file's name."""
    names, parts = dict(_TOP_NAMES), conventions(raw_config).names
    for layer in range(raw_config["num_hidden_layers"]):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{ours}.{kind}"] = f"blk.{layer}.{theirs}.{kind}"
    return names


def check_type(entry: TensorEntry) -> None:
    """Raise `WeightsError` unless tensors of this type can be read."""
    if entry.type not in TYPES:
        raise WeightsError(
            f"{entry.path}: tensor {entry.name!r} is of type {entry.type.name}, which can't be read; take a file of "
            f"these types: {', '.join(type_.name for type_ in TYPES)}"
        )


def read_tensor(entry: TensorEntry, part: Part | None = None) -> Tensor:
    """A tensor of a file, or only some of its rows or columns: mapped if it is plain, else dequantized to float32."""
    rows, columns = _region(entry, part)
    size, _ = GGML_QUANT_SIZES[entry.type]
    first = columns.start - columns.start % size  # blocks that the part cuts are read whole
    blocks = _map(entry, rows, range(first, -(-columns.stop // size) * size))
    tensor = _numbers(entry, blocks)[:, columns.start - first : columns.stop - first]
    return tensor.reshape(entry.shape if part is None else part.shape_of(entry.shape))


def _numbers(entry: TensorEntry, data: Tensor) -> Tensor:
    """The numbers [rows, columns] of a tensor, or of a part of it, from their bytes [rows, bytes]."""
    if entry.type in _PLAIN:
        return data.view(_PLAIN[entry.type])
    if block_format(entry) is not None:
        return _in_blocks(entry, data).dequantize()
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(data.contiguous().numpy(), entry.type))


def block_format(entry: TensorEntry) -> BlockFormat | None:
    """Format of blocks with exactly a matrix's numbers, its own or a wider one; None if there is none."""
    if len(entry.shape) != 2:
        return None
    return "q8_0" if entry.type in _WIDENED else _KEPT.get(entry.type)


def read_blocks(entry: TensorEntry, part: Part | None = None) -> BlockWeight:
    """A matrix that has a `block_format`, or some of its rows, or of its columns by whole blocks, in these blocks."""
    return _in_blocks(entry, _map(entry, *_region(entry, part)))


def _in_blocks(entry: TensorEntry, data: Tensor) -> BlockWeight:
    """The bytes [rows, bytes] of a matrix, or of a part of it, in blocks that native kernels read."""
    if entry.type in _WIDENED:
        return BlockWeight("q8_0", _WIDENED[entry.type](data))
    return BlockWeight(_KEPT[entry.type], data)


def _nonlinear(rows: Tensor) -> Tensor:
    """IQ4_NL -> q8_0: the scale stays, 32 indices into a table of bytes become 32 bytes."""
    from gguf.quants import IQ4_NL

    blocks = rows.view(len(rows), -1, 18)
    places = torch.cat([blocks[..., 2:] & 0xF, blocks[..., 2:] >> 4], -1)
    return _as_q8_0(blocks[..., :2], torch.tensor(IQ4_NL.kvalues, dtype=torch.int8)[places.long()])


def _as_q8_0(scales: Tensor, numbers: Tensor) -> Tensor:
    """[O, G, 2] and [O, G, 32] -> [O, G * 34]."""
    assert numbers.shape[-1] + scales.shape[-1] == BLOCK_BYTES["q8_0"]
    return torch.cat([scales, numbers.view(torch.uint8)], -1).flatten(1)


_WIDENED: Mapping[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    GGMLQuantizationType.IQ4_NL: _nonlinear,
}


def _region(entry: TensorEntry, part: Part | None) -> tuple[range, range]:
    """Rows and columns of a part, the last dimension being the columns; of all without one."""
    *outer, width = entry.shape
    rows, columns = range(prod(outer)), range(width)
    if part is None:
        return rows, columns
    assert len(entry.shape) <= 2, entry.shape
    wanted = range(part.start, part.stop)
    return (rows, wanted) if part.dim == len(outer) else (wanted, columns)


def _map(entry: TensorEntry, rows: range, columns: range) -> Tensor:
    """[rows, bytes] of whole blocks of a tensor, uint8, in a mapping of its own: its pages go when it does.

    Only these rows are mapped; of the bytes between the columns, only those in the same pages are ever read.
    """
    block, num_bytes = GGML_QUANT_SIZES[entry.type]
    row_bytes = entry.shape[-1] // block * num_bytes
    offset, length = entry.offset + rows.start * row_bytes, len(rows) * row_bytes
    first = offset - offset % mmap.ALLOCATIONGRANULARITY
    with entry.path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), offset + length - first, access=mmap.ACCESS_COPY, offset=first)
    data = torch.frombuffer(memory, dtype=torch.uint8)[offset - first :].view(len(rows), row_bytes)
    return data[:, columns.start // block * num_bytes : columns.stop // block * num_bytes]
