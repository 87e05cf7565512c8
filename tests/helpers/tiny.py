"""Tiny random models: small enough to be made and loaded in milliseconds, with weights that all matter."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""4 layers, 32 channels, grouped heads."""
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 2},
}
"""What a family's config.json needs besides."""


def write_tiny(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | None = None,
    fused_experts: bool = False,
    **config: Any,
) -> None:
    """Let transformers write a checkpoint of any family.

    Args:
        folder: Where to.
        model_type: The family.
        seed: Seed of the weights.
        dtype: Dtype of the file.
        max_shard_size: Such as "40KB", for a checkpoint of several files.
        fused_experts: Write all experts of a layer into one tensor, as transformers has them in memory.
        **config: Keys of config.json that differ from `TINY_CONFIG`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**TINY_CONFIG, **FAMILY_CONFIGS.get(model_type, {}), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=max_shard_size or "1GB", save_original_format=not fused_experts
    )


def randomize(model: Any, seed: int) -> None:
    """Give every weight a random value that matters: transformers starts norms at 1, biases at 0, the rest near 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # norms and biases: keep their centre, 1 or 0
                weight.add_(0.3 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)


def write_agreeing(
    folder: Path,
    *,
    seed: int = 0,
    vocab: int = 48,
    width: int = 32,
    layers: int = 5,
    inner: int = 48,
    context: int = 96,
    early: int = 2,
    late: float = 0.25,
    sharpness: float = 3.0,
) -> None:
    """Write a Llama whose exits agree with its last layer now and then.

    Args:
        folder: Where to.
        seed: Seed of the weights.
        vocab: V.
        width: D.
        layers: L.
        inner: Width of the MLP.
        context: Longest sequence in tokens.
        early: Layers that contribute in full.
        late: Factor of what the layers after them contribute.
        sharpness: Factor of the head: the larger, the more certain the model is.
    """
    import torch
    from safetensors.torch import save_file

    kv_width = width // 2
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float = 1.0) -> "Tensor":
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    tensors = {
        "model.embed_tokens.weight": random(vocab, width, width**0.5),
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": random(vocab, width, sharpness),
    }
    for index in range(layers):
        weight = 1.0 if index < early else late
        parts = {
            "input_layernorm": torch.ones(width),
            "self_attn.q_proj": random(width, width, 2.0),
            "self_attn.k_proj": random(kv_width, width, 2.0),
            "self_attn.v_proj": random(kv_width, width),
            "self_attn.o_proj": random(width, width, 2.0 * weight),
            "post_attention_layernorm": torch.ones(width),
            "mlp.gate_proj": random(inner, width),
            "mlp.up_proj": random(inner, width),
            "mlp.down_proj": random(width, inner, 2.0 * weight),
        }
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")


def contributing_layer(name: str) -> int:
    """The layer that adds its output to the hidden state by the weight of this name; -1 for all other weights.

    Scaled by a factor, these weights scale what their layer contributes: the exits before it then agree more often.
    """
    if not name.endswith(("o_proj.weight", "down_proj.weight")):
        return -1
    return int(name.split("layers.")[1].split(".")[0])
