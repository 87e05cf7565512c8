"""GGUF files made of checkpoints in Hugging Face's format, as converters make them; for tests."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from k_quants import quantize
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
}
IN_PAIRS = ("llama", "mistral", "mixtral", "granite", "smollm3")
"""Families whose files have the two channels of a rotary pair side by side."""
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "gate_exps": "ffn_gate_exps",
    "up_exps": "ffn_up_exps",
    "down_exps": "ffn_down_exps",
}
GEMMA_PARTS = {
    **PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OLMO2_PARTS = {
    **PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHER_PARTS = {"gemma3_text": GEMMA_PARTS, "olmo2": OLMO2_PARTS}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(
    folder: Path,
    path: Path,
    *,
    type_: GGMLQuantizationType = GGMLQuantizationType.F32,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        folder: config.json and model.safetensors.
        path: The file to write.
        type_: Of matrices whose rows are long enough; the others and vectors are float32.
        types: Other ones, by the file's name of a part, such as `attn_v` or `token_embd`.
        metadata: More keys (texts, numbers, lists of texts), such as a tokenizer's.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    add_config(writer, config)
    add_rope(writer, config)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    for name, tensor in stack_experts(load_file(folder / "model.safetensors")).items():
        add_tensor(writer, config, name, tensor, type_, types or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPERT_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def stack_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with those of a layer's experts put one upon the other, in the order of their numbers."""
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in plain:
            layer, expert = name.split(".")[2], name.split(".experts.")[1]
            number, part, _ = expert.split(".")
            stacks.setdefault(f"model.layers.{layer}.{EXPERT_PARTS[part]}_exps.weight", {})[int(number)] = tensor
    return plain | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key of whatever type the value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_config(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Sizes."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    window = config.get("sliding_window")
    if config["model_type"] == "phi3" or (window and config["model_type"] in ("mistral", "mixtral", "gemma3_text")):
        writer.add_sliding_window(window or 0)
    if config["model_type"] == "gemma3_text":
        kinds = config["layer_types"]
        writer.add_sliding_window_pattern(kinds.index("full_attention") + 1)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] == "granite":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for add, name, usual in (
            (writer.add_embedding_scale, "embedding_multiplier", 1.0),
            (writer.add_attention_scale, "attention_multiplier", head_dim**-0.5),
            (writer.add_residual_scale, "residual_multiplier", 1.0),
            (writer.add_logit_scale, "logits_scaling", 1.0),
        ):
            if config[name] != usual:
                add(config[name])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def add_rope(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Rotary embedding, with the tensors of factors that some scalings have."""
    nested = config.get("rope_parameters", {"rope_theta": 10_000.0, "rope_type": "default"})
    parameters = nested.get("full_attention", nested)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    match parameters["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(parameters["factor"])
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(parameters["factor"])
            writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        case "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(parameters, rotated))
        case "longrope":
            original = parameters["original_max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(original)
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
            for kind in ("long", "short"):
                factors = np.array(parameters[f"{kind}_factor"], dtype=np.float32)
                writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def llama3_factors(parameters: Mapping[str, Any], rotated: int) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by, written down from its definition one frequency at a time."""
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    factors = []
    for channel in range(0, rotated, 2):
        wavelength = 2 * math.pi * parameters["rope_theta"] ** (channel / rotated)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(parameters["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def add_tensor(
    writer: GGUFWriter,
    config: Mapping[str, Any],
    name: str,
    tensor: torch.Tensor,
    type_: GGMLQuantizationType,
    types: Mapping[str, GGMLQuantizationType],
) -> None:
    """One tensor under the file's name, in the file's order of rows."""
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        theirs = f"{TOP[stem]}.{kind}"
    else:
        _, _, layer, part = stem.split(".", 3)
        parts = OTHER_PARTS.get(config["model_type"], PARTS)
        theirs = f"blk.{layer}.{parts[part]}.{kind}"
    array = tensor.float().numpy()
    if config["model_type"] in IN_PAIRS and ".q_proj." in name:
        array = in_pairs(array, config["num_attention_heads"])
    if config["model_type"] in IN_PAIRS and ".k_proj." in name:
        array = in_pairs(array, config["num_key_value_heads"])
    if config["model_type"] == "gemma3_text" and stem.endswith("norm"):
        array = array + np.float32(1)
    chosen = types.get(theirs.split(".")[-2], type_)
    chosen = fitting(array, chosen)
    writer.add_tensor(theirs, quantize(array, chosen), raw_dtype=chosen)


def tiny_sizes(type_name: str) -> dict[str, int]:
    """Widths of a tiny model whose rows are whole blocks of a type."""
    if GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0] == 256:
        return {"hidden_size": 256, "intermediate_size": 512}
    return {"hidden_size": 64, "intermediate_size": 96}


def fitting(array: np.ndarray, type_: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type, or as in llama.cpp another one, if rows aren't whole blocks of it."""
    others = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    if array.ndim > 1 and array.shape[-1] % GGML_QUANT_SIZES[type_][0] and type_.name in others:
        type_ = GGMLQuantizationType[others[type_.name]]
    return type_ if array.ndim > 1 and array.shape[-1] % 32 == 0 else GGMLQuantizationType.F32


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head so that the two channels of a rotary pair follow one another."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_random(path: Path, type_: GGMLQuantizationType, rows: int, inputs: int) -> torch.Tensor:
    """Write a file with one tensor `weight` of random blocks; returns the numbers that the gguf package reads there."""
    weights, size = GGML_QUANT_SIZES[type_]
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (rows, inputs // weights, size), dtype=np.uint8)
    scales = random.normal(size=(rows, inputs // weights, size // 2)).astype(np.float16).view(np.uint8)
    if weights > 1:  # scales and minima are float16, which random bytes aren't always
        for place in range(0, size - 1, 2):
            data[..., place : place + 2] = scales[..., place : place + 2]
    else:
        numbers = random.normal(size=(rows, inputs)).astype(np.float32)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_.name]
        data = torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy()
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("weight", data.reshape(rows, -1), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(dequantize(data.reshape(rows, -1), type_).reshape(rows, inputs).copy())
