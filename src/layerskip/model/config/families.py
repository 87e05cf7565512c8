"""Model families as data: the keys of config.json that each understands, its switches, and names of its weights.

To add one, add a `Family` to the table; the decoder itself has no code for any family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config.keys import check_keys
from layerskip.model.config.model_config import CORE_KEYS, FULL, SLIDING, ModelConfig, read_core
from layerskip.model.config.recurrent import running_state
from layerskip.model.config.values import MAX_LAYERS, read_flag, read_number, read_optional_size, read_size, shown

# Our name of a layer's weight -> the checkpoint's tensors that are stacked to make it (without ".weight").
SPLIT_WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
)
QK_NORMS: Mapping[str, tuple[str, ...]] = {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}
FUSED_WEIGHTS = {**SPLIT_WEIGHTS, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
GEMMA_WEIGHTS = {
    **SPLIT_WEIGHTS,
    **QK_NORMS,
    "post_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
OUTPUT_NORM_WEIGHTS = {
    **{ours: theirs for ours, theirs in SPLIT_WEIGHTS.items() if ours not in ("attention_norm", "mlp_norm")},
    **QK_NORMS,
    "post_attention_norm": ("post_attention_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}

Raw = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The tensors that a layer with experts has in place of an MLP's, without ".weight"."""

    router: str
    gate_up: tuple[str, ...]
    """Of one expert; {} stands for its number."""
    down: tuple[str, ...]
    """The same."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's config.json."""

    weights: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLIT_WEIGHTS)
    """Our name of a layer's weight -> the checkpoint's tensors that are stacked to make it."""
    experts: ExpertWeights | None = None
    """Tensors of layers with experts, if the family has such layers."""
    keys: frozenset[str] = frozenset()
    """Keys of config.json that the family understands besides `CORE_KEYS`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers assumes if config.json has none, where they differ from the common defaults."""
    switches: Callable[[Raw], dict[str, Any]] = lambda raw: {}
    """Fields of `ModelConfig` that this family sets."""


def _llama(raw: Raw) -> dict[str, Any]:
    bias = read_flag(raw, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read_flag(raw, "mlp_bias")}


def _layer_types(raw: Raw, default: tuple[str, ...]) -> tuple[str, ...]:
    """The kind of each layer, from the file's list."""
    given = raw.get("layer_types")
    if not given:
        return default
    if not isinstance(given, list) or not all(isinstance(kind, str) for kind in given):
        raise CheckpointError(f"config.json: 'layer_types' must be a list of texts, got {shown(given)}")
    return tuple(given)


def _all_sliding(raw: Raw, default: int | None) -> dict[str, Any]:
    window = read_optional_size({"sliding_window": default, **raw}, "sliding_window")
    kind = FULL if window is None else SLIDING
    return {"sliding_window": window, "layer_types": (kind,) * read_size(raw, "num_hidden_layers", MAX_LAYERS)}


def _late_sliding(raw: Raw) -> dict[str, Any]:
    """Qwen: with `use_sliding_window`, layers from `max_window_layers` on have a sliding window."""
    num_layers = read_size(raw, "num_hidden_layers", MAX_LAYERS)
    window = read_optional_size({"sliding_window": 4096, **raw}, "sliding_window")
    window = window if read_flag(raw, "use_sliding_window") else None
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
        raise CheckpointError(f"config.json: 'max_window_layers' must be a whole number, got {shown(first)}")
    types = tuple(SLIDING if window is not None and i >= first else FULL for i in range(num_layers))
    return {"sliding_window": window, "layer_types": _layer_types(raw, types)}


def _qwen2(raw: Raw) -> dict[str, Any]:
    return {"qkv_bias": True, **_late_sliding(raw)}


def _qwen3(raw: Raw) -> dict[str, Any]:
    bias = read_flag(raw, "attention_bias")
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **_late_sliding(raw)}


def _gemma3(raw: Raw) -> dict[str, Any]:
    bias, cap = read_flag(raw, "attention_bias"), "final_logit_softcapping"
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    pattern = next((size for name in names if (size := read_optional_size(raw, name)) is not None), 6)
    num_layers = read_size(raw, "num_hidden_layers", MAX_LAYERS)
    types = tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(num_layers))
    return {
        "qk_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "post_norms": True,
        "norm_weight_offset": 1.0,
        "embedding_multiplier": math.sqrt(read_size(raw, "hidden_size")),
        "attention_scale": 1.0 / math.sqrt(read_number(raw, "query_pre_attn_scalar", 256)),
        "sliding_window": read_optional_size({"sliding_window": 4096, **raw}, "sliding_window"),
        "layer_types": _layer_types(raw, types),
        "final_logit_softcapping": None if raw.get(cap) is None else read_number(raw, cap),
    }


def _olmo2(raw: Raw) -> dict[str, Any]:
    bias = read_flag(raw, "attention_bias")
    norms = {"qk_norm": True, "joint_qk_norm": True, "pre_norms": False, "post_norms": True}
    return {"qkv_bias": bias, "o_bias": bias, **norms}


def _granite(raw: Raw) -> dict[str, Any]:
    return {
        **_llama(raw),
        "embedding_multiplier": read_number(raw, "embedding_multiplier", 1.0),
        "attention_scale": read_number(raw, "attention_multiplier", 1.0),
        "residual_multiplier": read_number(raw, "residual_multiplier", 1.0),
        "logits_multiplier": 1.0 / read_number(raw, "logits_scaling", 1.0),
    }


def _smollm3(raw: Raw) -> dict[str, Any]:
    num_layers = read_size(raw, "num_hidden_layers", MAX_LAYERS)
    unrotated = _unrotated(raw, num_layers)
    window = read_optional_size(raw, "sliding_window")
    slides = read_flag(raw, "use_sliding_window") and window is not None
    types = tuple(SLIDING if slides and layer in unrotated else FULL for layer in range(num_layers))
    types = _layer_types(raw, types)
    used = window if SLIDING in types else None
    return {**_llama(raw), "unrotated_layers": unrotated, "sliding_window": used, "layer_types": types}


def _unrotated(raw: Raw, num_layers: int) -> frozenset[int]:
    """Layers without rotary embedding: those with a 0 in `no_rope_layers`, or else one in `no_rope_layer_interval`."""
    given = raw.get("no_rope_layers")
    if given is None:
        interval = read_size({"no_rope_layer_interval": 4, **raw}, "no_rope_layer_interval")
        return frozenset(range(interval - 1, num_layers, interval))
    if not isinstance(given, list) or len(given) < num_layers or not all(flag in (0, 1) for flag in given):
        raise CheckpointError(
            f"config.json: 'no_rope_layers' must be a list of 0 or 1 for each of {num_layers} layers, got "
            f"{shown(given)}"
        )
    return frozenset(layer for layer in range(num_layers) if not given[layer])


def _mixtral(raw: Raw) -> dict[str, Any]:
    return {
        **_all_sliding(raw, None),
        **_experts(raw, num_experts=8, per_token=2),
        "moe_intermediate_size": read_size(raw, "intermediate_size"),
        "norm_topk_prob": True,
        "sparse_layers": frozenset(range(read_size(raw, "num_hidden_layers", MAX_LAYERS))),
    }


def _qwen3_moe(raw: Raw) -> dict[str, Any]:
    bias, num_layers = read_flag(raw, "attention_bias"), read_size(raw, "num_hidden_layers", MAX_LAYERS)
    slides = read_flag(raw, "use_sliding_window")
    step = read_size({"decoder_sparse_step": 1, **raw}, "decoder_sparse_step")
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in dense):
        raise CheckpointError(f"config.json: 'mlp_only_layers' must be a list of layers from 0, got {shown(dense)}")
    return {
        "qk_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        **_all_sliding({**raw, **({} if slides else {"sliding_window": None})}, 4096),
        **_experts(raw, num_experts=128, per_token=8),
        "moe_intermediate_size": read_size({"moe_intermediate_size": 768, **raw}, "moe_intermediate_size"),
        "norm_topk_prob": read_flag(raw, "norm_topk_prob"),
        "sparse_layers": frozenset(range(step - 1, num_layers, step)) - frozenset(dense),
    }


def _experts(raw: Raw, *, num_experts: int, per_token: int) -> dict[str, int]:
    """Number of experts, of which transformers knows two names, and how many of them each token goes through."""
    names = ("num_local_experts", "num_experts")
    sizes = {name: size for name in names if (size := read_optional_size(raw, name)) is not None}
    if len(set(sizes.values())) > 1:
        raise CheckpointError(f"config.json: num_local_experts and num_experts must be equal, got {sizes}")
    experts = next(iter(sizes.values()), num_experts)
    chosen = read_size({"num_experts_per_tok": per_token, **raw}, "num_experts_per_tok")
    if chosen > experts:
        raise CheckpointError(
            f"config.json: 'num_experts_per_tok' must be at most the number of experts, {experts}, got {chosen}"
        )
    return {"num_experts": experts, "num_experts_per_tok": chosen}


_QWEN_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_EXPERT_KEYS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})

# Keys that transformers doesn't use, and that whole series of checkpoints have, are understood without effect:
# `max_window_layers` of SmolLM3 and Qwen3's mixtures of experts.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(keys=frozenset({"attention_bias", "mlp_bias"}), switches=_llama),
        "mistral": Family(keys=frozenset({"sliding_window"}), switches=lambda raw: _all_sliding(raw, 4096)),
        "qwen2": Family(keys=_QWEN_KEYS, switches=_qwen2),
        "qwen3": Family(
            weights={**SPLIT_WEIGHTS, **QK_NORMS},
            keys=_QWEN_KEYS | {"attention_bias"},
            defaults={"head_dim": 128},
            switches=_qwen3,
        ),
        "gemma3_text": Family(
            weights=GEMMA_WEIGHTS,
            keys=frozenset(
                """attention_bias query_pre_attn_scalar sliding_window layer_types sliding_window_pattern
                _sliding_window_pattern rope_local_base_freq final_logit_softcapping""".split()
            ),
            defaults={
                "head_dim": 256,
                "hidden_act": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
                "rope_theta": {FULL: 1_000_000.0, SLIDING: 10_000.0},
            },
            switches=_gemma3,
        ),
        "phi3": Family(
            weights=FUSED_WEIGHTS,
            keys=frozenset({"sliding_window"}),
            defaults={"rms_norm_eps": 1e-5},
            switches=lambda raw: _all_sliding(raw, None),
        ),
        "olmo2": Family(
            weights=OUTPUT_NORM_WEIGHTS,
            keys=frozenset({"attention_bias"}),
            defaults={"rms_norm_eps": 1e-5},
            switches=_olmo2,
        ),
        "granite": Family(
            keys=frozenset(
                """attention_bias mlp_bias embedding_multiplier attention_multiplier residual_multiplier
                logits_scaling""".split()
            ),
            switches=_granite,
        ),
        "smollm3": Family(
            keys=frozenset(
                """attention_bias mlp_bias use_sliding_window sliding_window layer_types no_rope_layers
                no_rope_layer_interval max_window_layers""".split()
            ),
            defaults={"tie_word_embeddings": True, "rope_theta": {FULL: 2_000_000.0, SLIDING: 2_000_000.0}},
            switches=_smollm3,
        ),
        "mixtral": Family(
            experts=ExpertWeights(
                router="block_sparse_moe.gate",
                gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
                down=("block_sparse_moe.experts.{}.w2",),
            ),
            keys=_EXPERT_KEYS | {"sliding_window"},
            defaults={"rms_norm_eps": 1e-5, "rope_theta": {FULL: 1_000_000.0, SLIDING: 1_000_000.0}},
            switches=_mixtral,
        ),
        "qwen3_moe": Family(
            weights={**SPLIT_WEIGHTS, **QK_NORMS},
            experts=ExpertWeights(
                router="mlp.gate",
                gate_up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
                down=("mlp.experts.{}.down_proj",),
            ),
            keys=_EXPERT_KEYS
            | frozenset(
                """attention_bias use_sliding_window sliding_window max_window_layers decoder_sparse_step
                moe_intermediate_size norm_topk_prob mlp_only_layers""".split()
            ),
            switches=_qwen3_moe,
        ),
    }
)


def parse_config(raw: Raw) -> ModelConfig:
    """Turn the contents of a config.json into a `ModelConfig`.

    Raises:
        UnsupportedModelError: An unknown family, one whose state can't be rolled back, or a key that may change the
            computation and isn't understood.
        CheckpointError: A size is missing or invalid.
    """
    model_type = str(raw.get("model_type"))
    kind = running_state(model_type)
    if kind is not None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported: it has {kind}, whose state can't be rolled back to an "
            "earlier position, as taking back rejected drafts needs; supported families, which keep keys and values of "
            f"every token: {', '.join(sorted(FAMILIES))}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    check_keys(raw, CORE_KEYS | family.keys, model_type)
    fields = read_core(raw, family.defaults)
    fields["layer_types"] = (FULL,) * fields["num_hidden_layers"]
    fields.update(family.switches(raw))
    types = fields["layer_types"]
    if len(types) != fields["num_hidden_layers"] or not set(types) <= {FULL, SLIDING}:
        raise CheckpointError(
            f"config.json: layer_types must name {FULL!r} or {SLIDING!r} for each layer, got {shown(types)}"
        )
    if SLIDING in types and not fields.get("sliding_window"):
        raise CheckpointError(f"config.json: layer_types has {SLIDING!r} but sliding_window is not set")
    return ModelConfig(model_type=model_type, **fields)
