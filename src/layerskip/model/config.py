"""What a decoder is: sizes and switches, read strictly from a Hugging Face config.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.checks import whole_number
from layerskip.errors import CheckpointError, InvalidArgumentError, PromptError, UnsupportedModelError
from layerskip.model.rope import RopeConfig, parse_rope

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")

# Keys without influence on the logits of inference: identity, training, generation defaults, library bookkeeping.
INERT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id layerskip
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict _from_model_config
    """.split()
)

# Keys that every family understands: sizes, rotary embeddings, head.
CORE_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act hidden_activation rms_norm_eps max_position_embeddings original_max_position_embeddings
    tie_word_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor
    """.split()
)

# Keys that would change the computation, and whose neutral values are accepted everywhere.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({},),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),  # Phi-4-mini's, of its remote code
    "interpolate_factor": (1,),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder; names are Hugging Face's."""

    model_type: str
    """Family, a key of `families.FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    """Context in tokens."""
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    """Attention of each layer: `full_attention` or `sliding_attention`."""
    ropes: Mapping[str, RopeConfig]
    """Rotary embedding for each kind of layer."""
    sliding_window: int | None = None
    """Tokens, itself included, that a query of a sliding layer sees."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm on each head of queries and keys."""
    post_norms: bool = False
    """Norms on the outputs of attention and MLP too (Gemma)."""
    norm_weight_offset: float = 0.0
    """Added to every norm's stored weight (1 for Gemma)."""
    embedding_multiplier: float = 1.0
    attention_scale: float
    """Factor on query-key products."""
    final_logit_softcapping: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """L, for short."""
        return self.num_hidden_layers

    def check_exit_layer(self, exit_layer: int) -> int:
        """Return `exit_layer` (the number of layers run, 1..L) or raise `InvalidArgumentError`."""
        exit_layer = whole_number("exit_layer", exit_layer, least=-(2**63))
        if not 1 <= exit_layer <= self.num_layers:
            raise InvalidArgumentError(
                f"exit_layer {exit_layer} is outside 1..{self.num_layers}; it is the number of layers run, "
                f"and this model has {self.num_layers}"
            )
        return exit_layer

    def check_token_ids(self, tokens: Sequence[int], name: str) -> None:
        """Raise `PromptError` unless all tokens of the text called `name` are in the vocabulary."""
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise PromptError(f"{name} has token id {token!r}; allowed are whole numbers 0..{self.vocab_size - 1}")


def read_size(raw: Mapping[str, Any], key: str) -> int:
    """A required positive whole number of config.json."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key!r} must be a positive whole number, got {value!r}")
    return value


def read_optional_size(raw: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number of config.json, or None where it is silent or null."""
    return None if raw.get(key) is None else read_size(raw, key)


def check_keys(raw: Mapping[str, Any], understood: frozenset[str], model_type: str) -> None:
    """Refuse any key that isn't known to be harmless: an ignored one could silently change the model.

    Raises:
        UnsupportedModelError: Naming the key, its value and what to do.
    """
    if raw.get("quantization_config") is not None:
        given = raw["quantization_config"]
        method = given.get("quant_method", "unknown method") if isinstance(given, Mapping) else given
        raise UnsupportedModelError(
            f"this checkpoint is quantized ({method}); load the original checkpoint in float32, bfloat16 or float16"
        )
    for key, value in raw.items():
        if key in INERT_KEYS or key in understood or value is None:
            continue
        if key in NEUTRAL_VALUES:
            if value in NEUTRAL_VALUES[key]:
                continue
            raise UnsupportedModelError(
                f"config.json: {key} = {value!r} is not supported for model_type {model_type!r} "
                f"(only {NEUTRAL_VALUES[key][0]!r})"
            )
        raise UnsupportedModelError(
            f"config.json: key {key!r} = {value!r} is not understood for model_type {model_type!r} and may change the "
            "computation; if it does not, remove it from config.json, otherwise this model is not supported yet"
        )


def read_ropes(raw: Mapping[str, Any], head_dim: int, theta: Mapping[str, float]) -> dict[str, RopeConfig]:
    """Rotary embeddings by kind of layer, from the old keys or from `rope_parameters`, nested by kind or not.

    Args:
        raw: config.json.
        head_dim: Channels of a head.
        theta: The family's default base wavelength of each kind of layer.

    Raises:
        UnsupportedModelError: An unknown type or key.
        CheckpointError: A parameter is missing or makes no sense.
    """
    table = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"config.json: rope parameters must be an object, got {table!r}")
    nested = any(kind in table for kind in (FULL, SLIDING))
    local_theta = raw.get("rope_local_base_freq")

    def parse(kind: str) -> RopeConfig:
        parameters = (table.get(kind) or {}) if nested else table
        base = raw.get("rope_theta") or theta[kind]
        if kind == SLIDING and theta[SLIDING] != theta[FULL]:  # local layers have a base of their own, never scaled
            base = local_theta or theta[SLIDING]
            parameters = parameters if nested else {}
        return parse_rope(
            parameters,
            head_dim=head_dim,
            rope_theta=float(base),
            partial_rotary_factor=float(raw.get("partial_rotary_factor") or 1.0),
            max_position_embeddings=read_size(raw, "max_position_embeddings"),
            original_max_position_embeddings=raw.get("original_max_position_embeddings"),
        )

    return {kind: parse(kind) for kind in (FULL, SLIDING)}


def read_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, whatever form config.json has them in."""
    given = raw.get("eos_token_id")
    ids = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"eos_token_id must be a token id or a list of them, got {given!r}")
    return ids


def read_core(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that all families share.

    Args:
        raw: config.json.
        defaults: Values that transformers assumes for this family where config.json is silent.
    """
    heads = read_size(raw, "num_attention_heads")
    hidden_size = read_size(raw, "hidden_size")
    head_dim = read_optional_size(raw, "head_dim") or defaults.get("head_dim") or hidden_size // heads
    kv_heads = read_optional_size(raw, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(f"config.json: num_attention_heads {heads} is not a multiple of {kv_heads} KV heads")
    activation = raw.get("hidden_act") or raw.get("hidden_activation") or defaults.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    tied = raw.get("tie_word_embeddings")
    theta = defaults.get("rope_theta", {FULL: 10000.0, SLIDING: 10000.0})
    return {
        "vocab_size": read_size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": read_size(raw, "intermediate_size"),
        "num_hidden_layers": read_size(raw, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": activation,
        "rms_norm_eps": float(raw.get("rms_norm_eps") or defaults.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": read_size(raw, "max_position_embeddings"),
        "tie_word_embeddings": bool(defaults.get("tie_word_embeddings", False) if tied is None else tied),
        "ropes": read_ropes(raw, head_dim, theta),
        "attention_scale": 1.0 / math.sqrt(head_dim),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": read_eos(raw),
    }
