"""Metadata of a GGUF file from a model's configuration; the inverse of `layerskip.checkpoint.gguf.config`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import RopeScalingType

from layerskip.checkpoint.gguf.config import (
    ARCHITECTURES,
    GEMMA3_27B_LAYERS,
    GEMMA3_GLOBAL_EVERY,
    SMOLLM3_UNROTATED_EVERY,
)
from layerskip.errors import UnsupportedModelError
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import FULL, SLIDING, ModelConfig
from layerskip.model.config.rope import RopeConfig
from layerskip.model.rope import inverse_frequencies

ARCHITECTURE_OF = {
    **{known.model_type: name for name, known in ARCHITECTURES.items() if FAMILIES[known.model_type].experts is None},
    "mistral": "llama",
}
"""`general.architecture` by model_type, of families without experts; a Mistral is a Llama to llama.cpp."""
SAMPLERS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Settings of generation_config.json -> keys below `general.sampling`."""


def architecture_of(config: ModelConfig) -> str:
    """The file's architecture.

    Raises:
        UnsupportedModelError: llama.cpp has none for this family, or not with this configuration.
    """
    architecture = ARCHITECTURE_OF.get(config.model_type)
    if architecture is None:
        raise UnsupportedModelError(
            f"llama.cpp has no architecture for model_type {config.model_type!r} here; families that can be written as "
            f"GGUF: {', '.join(sorted(ARCHITECTURE_OF))}"
        )
    for what, is_missing in _missing(config, architecture).items():
        if is_missing:
            raise UnsupportedModelError(
                f"llama.cpp's architecture {architecture!r} has no {what}, which this model has; it can't be written "
                "as a GGUF file"
            )
    return architecture


def _missing(config: ModelConfig, architecture: str) -> dict[str, bool]:
    """What a model of the family may have, and llama.cpp has not: whether this model has it."""
    is_gemma, is_llama = architecture == "gemma3", architecture == "llama"
    width = config.hidden_size // config.num_attention_heads if config.num_layers == GEMMA3_27B_LAYERS else None
    scale = 1 / math.sqrt(width or config.head_dim) if is_gemma else 1 / math.sqrt(config.head_dim)
    every = SMOLLM3_UNROTATED_EVERY if architecture == "smollm3" else config.num_layers + 1
    unrotated = frozenset(range(every - 1, config.num_layers, every))
    rotated = config.ropes[FULL].rotary_dim
    return {
        f"activation {config.hidden_act!r}": config.hidden_act != ARCHITECTURES[architecture].hidden_act,
        "biases of attention": (config.qkv_bias or config.o_bias) and not (is_llama or architecture == "qwen2"),
        "biases of the MLP": config.mlp_bias and not is_llama,
        "sliding windows": SLIDING in config.layer_types and architecture not in ("llama", "gemma3", "phi3"),
        "such layers without rotary embedding": unrotated != config.unrotated_layers,
        "such factor on attention": architecture != "granite"
        and not math.isclose(config.attention_scale, scale, rel_tol=1e-6),
        "heads that are rotated in part": rotated != config.head_dim and architecture != "phi3",
        "scaled rotary embedding in sliding layers": is_gemma and config.ropes[SLIDING].rope_type != "default",
        "such pattern of sliding layers": is_gemma and sliding_period(config) is None,
    }


def add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add sizes, switches and rotary embeddings; `general.architecture` is the writer's.

    Raises:
        UnsupportedModelError: A rotary embedding that llama.cpp doesn't have.
    """
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    kinds = set(config.layer_types)
    if SLIDING in kinds or config.model_type == "phi3":  # llama.cpp asks for this key of every Phi 3
        writer.add_sliding_window((config.sliding_window or 0) if SLIDING in kinds else 0)
    if config.model_type == "gemma3_text":
        period = sliding_period(config)
        assert period is not None, "checked by architecture_of"
        if SLIDING in kinds:
            writer.add_sliding_window_pattern(period)
            writer.add_float32(f"{writer.arch}.rope.freq_base_swa", config.ropes[SLIDING].rope_theta)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_scale)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1.0 / config.logits_multiplier)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def sliding_period(config: ModelConfig) -> int | None:
    """Layers from one full-attention layer to the next, if the layers follow such a pattern: the last one is full.

    First layers of a model may have no full one; their period is then any that is longer.
    """
    types = config.layer_types
    if SLIDING not in types:
        return GEMMA3_GLOBAL_EVERY  # without a window, the pattern doesn't matter
    period = types.index(FULL) + 1 if FULL in types else max(GEMMA3_GLOBAL_EVERY, len(types) + 1)
    fits = all((kind == FULL) == ((index + 1) % period == 0) for index, kind in enumerate(types))
    return period if fits else None


def rope_tensors(writer: GGUFWriter, config: ModelConfig) -> dict[str, np.ndarray]:
    """Add the rotary embedding's keys, and return the tensors of factors on frequencies, float32, by name.

    Raises:
        UnsupportedModelError: llama.cpp doesn't have this scaling.
    """
    rope = config.ropes[FULL if FULL in config.layer_types or config.model_type == "gemma3_text" else SLIDING]
    writer.add_rope_freq_base(rope.rope_theta)
    writer.add_rope_dimension_count(rope.rotary_dim)
    if writer.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    scaling = rope.scaling
    match rope.rope_type:
        case "default":
            return {}
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(scaling["factor"]))
            return {}
        case "yarn":
            _add_yarn(writer, rope)
            return {}
        case "llama3" if writer.arch == "llama":
            return {"rope_freqs.weight": _llama3_divisors(rope, config.max_position_embeddings)}
        case "longrope" if writer.arch == "phi3":
            return _add_longrope(writer, config, rope)
        case "longrope" if writer.arch == "llama" and _is_plain(scaling):
            return {"rope_freqs.weight": np.array(scaling["short_factor"], dtype=np.float32)}
    raise UnsupportedModelError(
        f"llama.cpp's architecture {writer.arch!r} has no rotary embedding of type {rope.rope_type!r} with these "
        "parameters; the model can't be written as a GGUF file"
    )


def add_samplers(writer: GGUFWriter, generation_config: Mapping[str, Any]) -> None:
    """Add the settings with which a model's authors sample, where generation_config.json has some."""
    if not generation_config.get("do_sample"):
        return
    for name, key in SAMPLERS.items():
        value = generation_config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "top_k":
            writer.add_int32(f"general.sampling.{key}", int(value))
        else:
            writer.add_float32(f"general.sampling.{key}", float(value))


def ignored_by_llama_cpp(config: ModelConfig) -> list[str]:
    """What llama.cpp leaves out when it runs the file, as notes."""
    window = config.sliding_window
    ignores = config.model_type in ("mistral", "phi3") and SLIDING in config.layer_types
    if not ignores or window is None or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp ignores this model's sliding window of {window} tokens: beyond as many tokens its text differs "
        "from the original's"
    ]


def _llama3_divisors(rope: RopeConfig, context: int) -> np.ndarray:
    """[R / 2] what Llama 3's scaling divides each frequency by."""
    plain = RopeConfig(
        rope_theta=rope.rope_theta,
        rotary_dim=rope.rotary_dim,
        original_max_position_embeddings=rope.original_max_position_embeddings,
    )
    divisors = inverse_frequencies(plain, context)[0] / inverse_frequencies(rope, context)[0]
    return divisors.float().numpy()


def _add_yarn(writer: GGUFWriter, rope: RopeConfig) -> None:
    """YaRN with the usual factor on attention, which llama.cpp computes by itself."""
    scaling = rope.scaling
    own = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if scaling.get(key) is not None]
    if own or scaling.get("truncate", True) is not True:
        raise UnsupportedModelError(
            f"this model's YaRN sets {(own or ['truncate'])[0]!r}, which GGUF files don't have; it can't be written as "
            "a GGUF file"
        )
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key) is not None:
            writer.add_float32(f"{writer.arch}.rope.scaling.yarn_{key}", float(scaling[key]))


def _add_longrope(writer: GGUFWriter, config: ModelConfig, rope: RopeConfig) -> dict[str, np.ndarray]:
    """Phi 3's factors for short and long contexts, and its factor on attention."""
    _, attention_factor = inverse_frequencies(rope, config.max_position_embeddings)
    writer.add_rope_scaling_attn_factors(attention_factor)
    return {
        f"rope_factors_{kind}.weight": np.array(rope.scaling[f"{kind}_factor"], dtype=np.float32)
        for kind in ("long", "short")
    }


def _is_plain(scaling: Mapping[str, Any]) -> bool:
    """Whether a LongRoPE is nothing but factors on frequencies, as our reader takes `rope_freqs.weight`."""
    return scaling["short_factor"] == scaling["long_factor"] and scaling.get("attention_factor") == 1.0
