"""A GGUF file's metadata as config.json and generation_config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerskip.checkpoint.gguf.container import Container
from layerskip.checkpoint.gguf.keys import ModelKeys
from layerskip.checkpoint.gguf.tensors import check_type, read_tensor
from layerskip.checkpoint.gguf.tokenizer import end_of_text_ids
from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config.model_config import FULL, SLIDING
from layerskip.model.config.rope import RopeConfig
from layerskip.model.rope import inverse_frequencies

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Parameters of every Llama 3.1, 3.2 and 3.3; a file contains only the resulting factors on frequencies."""
GEMMA3_GLOBAL_EVERY = 6
"""Layers from one full-attention layer of Gemma 3 to the next; files don't say so."""
GATING_BY_SOFTMAX = 1
"""Value of `expert_gating_func`."""
SMOLLM3_UNROTATED_EVERY = 4
"""Layers from one without rotary embedding of SmolLM3 to the next; files don't say so."""
BIASED = ("llama", "mistral", "qwen3", "qwen3_moe", "granite", "smollm3")
"""Families whose config.json says whether attention has biases."""
GEMMA3_27B_LAYERS = 62
"""Layers of Gemma 3 27B, which scales attention by width over heads, while smaller ones use channels of a head; files
don't say so."""
UNKNOWN_EXPERTS = ("expert_shared_count", "expert_group_count", "expert_weights_scale")
"""Keys of mixtures of experts of other kinds."""
FACTORS = ("logit_scale", "embedding_scale", "residual_scale", "attention.scale")
"""Keys that multiply something, in the architectures that have them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The Hugging Face equivalent of a `general.architecture`."""

    model_type: str
    class_name: str
    extra: Callable[["ModelKeys", dict[str, Any]], dict[str, Any]]
    """Function for the family's own keys of config.json, given the keys that all families share."""
    hidden_act: str = "silu"
    own_keys: frozenset[str] = frozenset()
    """Keys that `extra` reads, and that are refused elsewhere."""


def read_raw_config(container: Container) -> dict[str, Any]:
    """The contents of a config.json for the file's model.

    Raises:
        UnsupportedModelError: An architecture, or a feature of it, that isn't supported.
        CheckpointError: A key is missing or invalid.
    """
    metadata = ModelKeys(container)
    known = ARCHITECTURES.get(metadata.architecture)
    if known is None:
        raise UnsupportedModelError(
            f"{container.path} holds a model of architecture {metadata.architecture[:80]!r}, which is not supported; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    for key in ("expert_count", "attn_logit_softcapping", "attention.clamp_kqv", *FACTORS, *UNKNOWN_EXPERTS):
        if key not in known.own_keys and metadata.has(key):
            raise UnsupportedModelError(
                f"{container.path} sets {metadata.architecture}.{key}, which is not supported for "
                f"{known.model_type!r} models"
            )
    hidden_size, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    head_dim = metadata.count("attention.key_length", hidden_size // heads)
    if metadata.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{container.path} has values of another size than its keys; both must be alike")
    num_layers = metadata.count("block_count")
    if num_layers > len(container.tensors):
        raise CheckpointError(
            f"{container.path} has {num_layers} layers by its metadata, and {len(container.tensors)} tensors; it is "
            "damaged: download it again"
        )
    config: dict[str, Any] = {
        "model_type": known.model_type,
        "architectures": [known.class_name],
        "vocab_size": _vocabulary(container),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": known.hidden_act,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.count("context_length"),
        "tie_word_embeddings": "output.weight" not in container.tensors,
        "bos_token_id": metadata.token_id("bos_token_id"),
        "eos_token_id": metadata.token_id("eos_token_id"),
        "pad_token_id": metadata.token_id("padding_token_id"),
        "torch_dtype": "float32",
    }
    if "blk.0.attn_q.bias" in container.tensors and known.model_type in BIASED:
        config["attention_bias"] = True
    if "blk.0.ffn_up.bias" in container.tensors and known.model_type == "llama":
        config["mlp_bias"] = True
    config["rope_parameters"] = _rope(metadata, head_dim, config["max_position_embeddings"])
    return config | known.extra(metadata, config)


def read_generation_config(container: Container) -> dict[str, Any]:
    """The contents of a generation_config.json: the file's end tokens of texts, turns and messages.

    Raises:
        TokenizerError: The tokenizer's vocabulary is damaged.
    """
    if "tokenizer.ggml.tokens" not in container.metadata:
        return {}
    return {"eos_token_id": list(end_of_text_ids(container.plain_metadata()))}


def _vocabulary(container: Container) -> int:
    """Rows of the embedding table, which must match the number of the tokenizer's tokens.

    Raises:
        CheckpointError: There is no table, or the numbers don't match.
    """
    table = container.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{container.path} has no embedding table (token_embd.weight); it is not a whole model")
    tokens = container.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != table.shape[0]:
        raise CheckpointError(
            f"{container.path} has a vocabulary of {len(tokens)} tokens and an embedding table of {table.shape[0]} "
            "rows; they don't belong together: convert the model again"
        )
    return table.shape[0]


def _rope(metadata: ModelKeys, head_dim: int, context: int) -> dict[str, Any]:
    """The rotary embedding as `rope_parameters`."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    rotated = metadata.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        parameters["partial_rotary_factor"] = rotated / head_dim
    divisors = read_factors(metadata.container, "rope_freqs.weight", rotated // 2)
    if divisors is not None:
        return parameters | _frequency_divisors(divisors, parameters["rope_theta"], rotated, context)
    kind = metadata.text("rope.scaling.type", "none")
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        return parameters | _yarn(metadata, context)
    if kind not in ("none", "longrope", "su"):
        raise UnsupportedModelError(
            f"{metadata.container.path} scales its context by {kind[:80]!r}, which is not supported; supported: none, "
            "linear, yarn, longrope"
        )
    return parameters


def _yarn(metadata: ModelKeys, context: int) -> dict[str, Any]:
    for key in ("yarn_log_multiplier", "yarn_ext_factor"):
        if metadata.has(f"rope.scaling.{key}"):
            raise UnsupportedModelError(f"{metadata.container.path} sets rope.scaling.{key}, which is not supported")
    factor = metadata.number("rope.scaling.factor")
    original = metadata.count("rope.scaling.original_context_length", max(1, int(context / factor)))
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    given = {ours: f"rope.scaling.{theirs}" for ours, theirs in optional.items()}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **{ours: metadata.number(key) for ours, key in given.items() if metadata.has(key)},
    }


def read_factors(container: Container, name: str, count: int) -> list[float] | None:
    """A tensor of factors on frequencies, one for each pair of channels; None if the file has none.

    Raises:
        CheckpointError: There is another number of factors, or not all are positive.
    """
    entry = container.tensors.get(name)
    if entry is None:
        return None
    check_type(entry)
    values = read_tensor(entry).float().flatten().tolist()
    if len(values) != count or not all(0 < value < math.inf for value in values):
        raise CheckpointError(f"{container.path}: tensor {name!r} must be {count} positive numbers")
    return values


def _frequency_divisors(divisors: list[float], theta: float, rotated: int, context: int) -> dict[str, Any]:
    """Frequencies divided by factors: Llama 3's rule if the factors are its own, otherwise the factors as they are.

    The rule gives exactly the frequencies of the checkpoint that the file was made from. Other factors become a
    LongRoPE with equal short and long factors.
    """
    llama3 = {"factor": max(divisors), **LLAMA3_SCALING}
    plain = RopeConfig(rope_theta=theta, rotary_dim=rotated, original_max_position_embeddings=8192)
    scaled = RopeConfig(
        rope_type="llama3",
        rope_theta=theta,
        rotary_dim=rotated,
        original_max_position_embeddings=8192,
        scaling={key: value for key, value in llama3.items() if key != "original_max_position_embeddings"},
    )
    rule = (inverse_frequencies(plain, context)[0] / inverse_frequencies(scaled, context)[0]).tolist()
    if all(math.isclose(ours, theirs, rel_tol=1e-5) for ours, theirs in zip(rule, divisors, strict=True)):
        return {"rope_type": "llama3", **llama3}
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    """Llama, and Mistral and Mixtral, which converters store as Llama."""
    window = "attention.sliding_window"
    slides = {"sliding_window": metadata.count(window)} if metadata.has(window) else {}
    if metadata.has("expert_count"):
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **slides, **_experts(metadata)}
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **slides} if slides else {}


def _experts(metadata: ModelKeys) -> dict[str, Any]:
    """How many experts there are, and how many a token goes through."""
    name = f"{metadata.architecture}.expert_gating_func"
    gating = metadata.container.metadata.get(name, GATING_BY_SOFTMAX)
    if gating not in (0, GATING_BY_SOFTMAX):
        raise UnsupportedModelError(
            f"{metadata.container.path} has experts that are chosen by another function than softmax ({name} is "
            f"{gating}), which is not supported"
        )
    return {
        "num_local_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
    }


def _qwen3_moe(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_experts(metadata),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "norm_topk_prob": metadata.container.metadata.get("qwen3moe.expert_weights_norm", True),
        "use_sliding_window": False,
    }


def _gemma3(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    num_layers, scalar = config["num_hidden_layers"], config["head_dim"]
    if num_layers == GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    extra = {
        "query_pre_attn_scalar": scalar,
        "layer_types": _gemma3_layers(metadata, num_layers),
        "rope_parameters": {FULL: config["rope_parameters"], SLIDING: local},
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if metadata.has("attention.sliding_window"):
        extra["sliding_window"] = metadata.count("attention.sliding_window")
    if metadata.has("final_logit_softcapping"):
        extra["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return extra


def _gemma3_layers(metadata: ModelKeys, num_layers: int) -> list[str]:
    """Layers with a sliding window: from a list of booleans, from a period, or from the rule of all Gemma 3."""
    name = "attention.sliding_window_pattern"
    if not metadata.has("attention.sliding_window"):
        return [FULL] * num_layers
    pattern = metadata.container.metadata.get(f"{metadata.architecture}.{name}")
    if isinstance(pattern, np.ndarray):
        return [SLIDING if slides else FULL for slides in pattern.tolist()]
    every = metadata.count(name, GEMMA3_GLOBAL_EVERY)
    return [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(num_layers)]


def _phi3(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    window, context = "attention.sliding_window", config["max_position_embeddings"]
    original = metadata.count("rope.scaling.original_context_length", context)
    extra: dict[str, Any] = {
        "sliding_window": metadata.count(window) if metadata.has(window) else None,
        "original_max_position_embeddings": original,
    }
    pairs = metadata.count("rope.dimension_count", config["head_dim"]) // 2
    short = read_factors(metadata.container, "rope_factors_short.weight", pairs)
    long = read_factors(metadata.container, "rope_factors_long.weight", pairs)
    if short is None or long is None:
        return extra
    parameters = {
        **config["rope_parameters"],
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }
    scale = context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    attention_factor = metadata.number("rope.scaling.attn_factor", usual)
    if not math.isclose(attention_factor, usual, rel_tol=1e-6):  # otherwise config.json's default, exactly
        parameters["attention_factor"] = attention_factor
    return {**extra, "rope_parameters": parameters}


def _qwen2(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _olmo2(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    if metadata.has("attention.sliding_window"):
        raise UnsupportedModelError(
            f"{metadata.container.path} is an OLMo 3 (olmo2.attention.sliding_window is set), which is not supported; "
            "OLMo 2 is"
        )
    return {}


def _granite(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    if metadata.container.metadata.get("granite.rope.scaling.finetuned") is False:
        raise UnsupportedModelError(
            f"{metadata.container.path} has no rotary embedding (granite.rope.scaling.finetuned is false), which is "
            "not supported"
        )
    theirs = {
        "embedding_multiplier": ("embedding_scale", 1.0),
        "attention_multiplier": ("attention.scale", 1 / math.sqrt(config["head_dim"])),
        "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    }
    return {ours: metadata.number(key) if metadata.has(key) else usual for ours, (key, usual) in theirs.items()}


def _smollm3(metadata: ModelKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layer_interval": SMOLLM3_UNROTATED_EVERY, "use_sliding_window": False}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama", class_name="LlamaForCausalLM", extra=_llama, own_keys=frozenset({"expert_count"})
    ),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", extra=_qwen2),
    "qwen3": Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", extra=_qwen2),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        extra=_qwen3_moe,
        own_keys=frozenset({"expert_count"}),
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", class_name="Gemma3ForCausalLM", hidden_act="gelu_pytorch_tanh", extra=_gemma3
    ),
    "phi3": Architecture(model_type="phi3", class_name="Phi3ForCausalLM", extra=_phi3),
    "olmo2": Architecture(model_type="olmo2", class_name="Olmo2ForCausalLM", extra=_olmo2),
    "granite": Architecture(
        model_type="granite", class_name="GraniteForCausalLM", extra=_granite, own_keys=frozenset(FACTORS)
    ),
    "smollm3": Architecture(model_type="smollm3", class_name="SmolLM3ForCausalLM", extra=_smollm3),
}
"""Architectures by `general.architecture`."""
