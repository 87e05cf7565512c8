"""A GGUF file's tensors under Hugging Face's names and in its order of rows.

Shapes: O output width, I input width.
"""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from layerskip.checkpoint.gguf.container import Container, TensorEntry
from layerskip.errors import WeightsError
from layerskip.model.blocks import BLOCK_BYTES, BlockFormat, BlockWeight

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
    others = _FUSED_NAMES if model_type == "phi3" else _GEMMA_NAMES if model_type == "gemma3_text" else {}
    pairs = None
    if model_type in ("llama", "mistral"):
        pairs = {"attn_q": raw_config["num_attention_heads"], "attn_k": raw_config["num_key_value_heads"]}
    return Conventions(
        names={**_LAYER_NAMES, **others}, norm_offset=1.0 if model_type == "gemma3_text" else 0.0, pairs=pairs
    )


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
        names = _hugging_face_names(self._conventions.names, raw_config["num_hidden_layers"])
        for theirs, entry in container.tensors.items():
            if theirs in ROPE_TENSORS:
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

    def get(self, name: str) -> Tensor:
        """One tensor: as stored if it isn't quantized, else dequantized to float32."""
        entry = self._entries[name]
        tensor = read_tensor(entry)
        order = self._order(entry)
        if order is not None:
            tensor = tensor[order]
        if self._conventions.norm_offset and entry.name.endswith("norm.weight"):
            tensor = tensor.float() - self._conventions.norm_offset
        return tensor

    def block_format(self, name: str) -> BlockFormat | None:
        """Format of blocks with exactly the tensor's numbers, its own or a wider one; None if there is none."""
        return block_format(self._entries[name])

    def blocks(self, name: str) -> BlockWeight:
        """A tensor in the blocks of its `block_format`."""
        entry = self._entries[name]
        weight, order = read_blocks(entry), self._order(entry)
        return weight if order is None else weight.rows(order)

    def _order(self, entry: TensorEntry) -> Tensor | None:
        """Rows in Hugging Face's order, if the file's order differs."""
        part = entry.name.split(".")[-2]
        heads = (self._conventions.pairs or {}).get(part)
        rows = entry.shape[0]
        if heads is None or rows % (2 * heads):
            return None
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _hugging_face_names(parts: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """The file's name of every tensor -> Hugging Face's name."""
    names = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
    for layer in range(num_layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"blk.{layer}.{theirs}.{kind}"] = f"model.layers.{layer}.{ours}.{kind}"
    return names


def check_type(entry: TensorEntry) -> None:
    """Raise `WeightsError` unless tensors of this type can be read."""
    if entry.type not in TYPES:
        raise WeightsError(
            f"{entry.path}: tensor {entry.name!r} is of type {entry.type.name}, which can't be read; take a file of "
            f"these types: {', '.join(type_.name for type_ in TYPES)}"
        )


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor of a file: mapped if it isn't quantized, else dequantized to float32."""
    data = _map(entry)
    if entry.type in _PLAIN:
        return data.view(_PLAIN[entry.type]).reshape(entry.shape)
    if block_format(entry) is not None:
        return read_blocks(entry).dequantize()
    from gguf.quants import dequantize

    rows = data.view(-1, entry.num_bytes * entry.shape[-1] // _count(entry)).numpy()
    return torch.from_numpy(dequantize(rows, entry.type)).reshape(entry.shape)


def block_format(entry: TensorEntry) -> BlockFormat | None:
    """Format of blocks with exactly a matrix's numbers, its own or a wider one; None if there is none."""
    if len(entry.shape) != 2:
        return None
    return "q8_0" if entry.type in _WIDENED else _KEPT.get(entry.type)


def read_blocks(entry: TensorEntry) -> BlockWeight:
    """A matrix in the blocks of its `block_format`."""
    rows = _map(entry).view(entry.shape[0], -1)
    if entry.type in _WIDENED:
        return BlockWeight("q8_0", _WIDENED[entry.type](rows))
    return BlockWeight(_KEPT[entry.type], rows)


def _five_bits(rows: Tensor) -> Tensor:
    """Q5_0 -> q8_0: the scale stays, 32 fifth bits and 32 times four bits become 32 bytes."""
    blocks = rows.view(len(rows), -1, 22)
    bits = blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1
    low = torch.cat([blocks[..., 6:] & 0xF, blocks[..., 6:] >> 4], -1)
    numbers = (low | bits.flatten(-2) << 4).to(torch.int8) - 16
    return _as_q8_0(blocks[..., :2], numbers)


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
    GGMLQuantizationType.Q5_0: _five_bits,
    GGMLQuantizationType.IQ4_NL: _nonlinear,
}


def _count(entry: TensorEntry) -> int:
    return int(np.prod(entry.shape))


def _map(entry: TensorEntry) -> Tensor:
    """Bytes of a tensor, uint8, in a mapping of its own, whose pages are freed with it."""
    first = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    with entry.path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), entry.offset + entry.num_bytes - first, access=mmap.ACCESS_COPY, offset=first)
    return torch.frombuffer(memory, dtype=torch.uint8)[entry.offset - first :]
