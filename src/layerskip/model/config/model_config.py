"""Sizes and switches of a decoder, read strictly from a Hugging Face config.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.checks import whole_number
from layerskip.errors import CheckpointError, InvalidArgumentError, PromptError, UnsupportedModelError
from layerskip.model.config.rope import RopeConfig, parse_rope
from layerskip.model.config.values import (
    MAX_LAYERS,
    read_flag,
    read_number,
    read_optional_size,
    read_size,
    shown,
)

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")

# Keys that every family understands: sizes, rotary embeddings, LM head.
CORE_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act hidden_activation rms_norm_eps max_position_embeddings original_max_position_embeddings
    tie_word_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor
    """.split()
)


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
    """Tokens of the context."""
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    """Attention of each layer: `full_attention` or `sliding_attention`."""
    ropes: Mapping[str, RopeConfig]
    """Rotary embedding for each kind of layer."""
    sliding_window: int | None = None
    """Tokens that a query of a sliding layer attends to, itself included."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys have an RMS norm."""
    joint_qk_norm: bool = False
    """Whether that norm spans all heads of a token together, rather than each head alone."""
    pre_norms: bool = True
    """Whether the inputs of attention and MLP have norms."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP have norms."""
    norm_weight_offset: float = 0.0
    """Number added to every norm's stored weight (1 for Gemma)."""
    embedding_multiplier: float = 1.0
    attention_scale: float
    """Factor on query-key products."""
    residual_multiplier: float = 1.0
    """Factor on the outputs of attention and MLP before they are added to the state."""
    logits_multiplier: float = 1.0
    """Factor on logits; it is applied with the final norm's weight."""
    unrotated_layers: frozenset[int] = frozenset()
    """Layers without rotary embedding, from 0."""
    sparse_layers: frozenset[int] = frozenset()
    """Layers with experts in place of an MLP, from 0."""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    """Width of each expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts sum to 1, rather than those of all experts."""
    final_logit_softcapping: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    adapted_exits: tuple[int, ...] = ()
    """Exits that have an adapter, ascending. Adapter a is layer L + a, with keys and values of its own."""

    @property
    def num_layers(self) -> int:
        """L, a short name."""
        return self.num_hidden_layers

    @property
    def num_cached_layers(self) -> int:
        """Layers with keys and values: all L, then the exit adapters."""
        return self.num_hidden_layers + len(self.adapted_exits)

    def attention_of(self, layer: int) -> str:
        """`full_attention` or `sliding_attention`; an exit adapter is a layer of the same kind as the last one."""
        return self.layer_types[min(layer, self.num_hidden_layers - 1)]

    def rotates(self, layer: int) -> bool:
        """Whether a layer has a rotary embedding; an exit adapter is a layer of the same kind as the last one."""
        return min(layer, self.num_hidden_layers - 1) not in self.unrotated_layers

    def adapter_at(self, exit_layer: int) -> int | None:
        """Which layer adapts an exit: L + a; None at an exit without an adapter."""
        if exit_layer not in self.adapted_exits:
            return None
        return self.num_hidden_layers + self.adapted_exits.index(exit_layer)

    def check_exit_layer(self, exit_layer: int) -> int:
        """Return `exit_layer` (1..L, the number of layers that run) or raise `InvalidArgumentError`."""
        exit_layer = whole_number("exit_layer", exit_layer, least=-(2**63))
        if not 1 <= exit_layer <= self.num_layers:
            raise InvalidArgumentError(
                f"exit_layer {exit_layer} is outside 1..{self.num_layers}; it is the number of layers run, "
                f"and this model has {self.num_layers}"
            )
        return exit_layer

    def check_token_ids(self, tokens: Sequence[int], name: str) -> None:
        """Raise `PromptError` unless all tokens are in the vocabulary; `name` is for the message."""
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise PromptError(f"{name} has token id {token!r}; allowed are whole numbers 0..{self.vocab_size - 1}")


def read_ropes(raw: Mapping[str, Any], head_dim: int, theta: Mapping[str, float]) -> dict[str, RopeConfig]:
    """Rotary embeddings by kind of layer, from the old keys or from `rope_parameters` (nested by kind or not).

    Args:
        raw: config.json.
        head_dim: Channels of a head.
        theta: The family's default base wavelength of each kind of layer.

    Raises:
        UnsupportedModelError: An unknown type or key.
        CheckpointError: A parameter is missing or invalid.
    """
    table = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"config.json: rope parameters must be an object, got {shown(table)}")
    nested = any(kind in table for kind in (FULL, SLIDING))

    def parse(kind: str) -> RopeConfig:
        parameters = (table.get(kind) or {}) if nested else table
        if not isinstance(parameters, Mapping):
            raise CheckpointError(f"config.json: rope parameters must be an object, got {shown(parameters)}")
        base = read_number(raw, "rope_theta", theta[kind])
        if kind == SLIDING and theta[SLIDING] != theta[FULL]:  # sliding layers have their own unscaled base
            base = read_number(raw, "rope_local_base_freq", theta[SLIDING])
            parameters = parameters if nested else {}
        return parse_rope(
            parameters,
            head_dim=head_dim,
            rope_theta=base,
            partial_rotary_factor=read_number(raw, "partial_rotary_factor", 1.0),
            max_position_embeddings=read_size(raw, "max_position_embeddings"),
            original_max_position_embeddings=read_optional_size(raw, "original_max_position_embeddings"),
        )

    return {kind: parse(kind) for kind in (FULL, SLIDING)}


def read_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, from any form in config.json."""
    given = raw.get("eos_token_id")
    ids = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"eos_token_id must be a token id or a list of them, got {given!r}")
    return ids


def read_core(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that all families share.

    Args:
        raw: config.json.
        defaults: Values that transformers assumes for this family if config.json has none.
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
    theta = defaults.get("rope_theta", {FULL: 10000.0, SLIDING: 10000.0})
    return {
        "vocab_size": read_size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": read_size(raw, "intermediate_size"),
        "num_hidden_layers": read_size(raw, "num_hidden_layers", MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": activation,
        "rms_norm_eps": read_number(raw, "rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": read_size(raw, "max_position_embeddings"),
        "tie_word_embeddings": read_flag(
            raw, "tie_word_embeddings", default=defaults.get("tie_word_embeddings", False)
        ),
        "ropes": read_ropes(raw, head_dim, theta),
        "attention_scale": 1.0 / math.sqrt(head_dim),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": read_eos(raw),
    }
