"""Configurations of well-known checkpoints are read as transformers reads them, in its old and its new spelling."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_sources import Tensors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layerskip.checkpoint.loading.experts import with_single_experts
from layerskip.checkpoint.loading.tensors import tensor_shapes
from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config.families import FAMILIES, parse_config
from layerskip.model.config.model_config import FULL, SLIDING, ModelConfig
from layerskip.model.rope import inverse_frequencies

# What each repository's config.json holds; Phi's lists of factors have the right length only.
HUB_CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "hub_configs.json").read_text()
)

# Layers, heads, KV heads, channels of a head, sliding window, kinds of the first six layers, tied head.
EXPECTED = {
    "Llama-2-7b": (32, 32, 32, 128, None, "ffffff", False),
    "Llama-3.1-8B": (32, 32, 8, 128, None, "ffffff", False),
    "Llama-3.2-1B": (16, 32, 8, 64, None, "ffffff", True),
    "CodeLlama-7b": (32, 32, 32, 128, None, "ffffff", False),
    "TinyLlama-1.1B": (22, 32, 4, 64, None, "ffffff", False),
    "SmolLM2-135M": (30, 9, 3, 64, None, "ffffff", True),
    "Mistral-7B-v0.1": (32, 32, 8, 128, 4096, "ssssss", False),
    "Mistral-7B-v0.3": (32, 32, 8, 128, None, "ffffff", False),
    "Qwen2.5-0.5B": (24, 14, 2, 64, None, "ffffff", True),
    "Qwen3-0.6B": (28, 16, 8, 128, None, "ffffff", True),
    "gemma-3-1b-it": (26, 4, 1, 256, 512, "sssssf", True),
    "gemma-3-270m": (18, 4, 1, 256, 512, "sssssf", True),
    "Phi-3-mini-4k": (32, 32, 32, 96, 2047, "ssssss", False),
    "Phi-3.5-mini": (32, 32, 32, 96, 262144, "ssssss", False),
    "Phi-4-mini": (32, 24, 8, 128, 262144, "ssssss", True),
    "OLMo-2-0425-1B": (16, 16, 16, 128, None, "ffffff", False),
    "granite-3.3-2b-instruct": (40, 32, 8, 64, None, "ffffff", True),
    "SmolLM3-3B": (36, 16, 4, 128, None, "ffffff", True),
    "Mixtral-8x7B-v0.1": (32, 32, 8, 128, None, "ffffff", False),
    "Qwen3-30B-A3B": (48, 32, 4, 128, None, "ffffff", False),
}


def read_by_transformers(raw: dict[str, Any]) -> PreTrainedConfig:
    return type(AutoConfig.for_model(raw["model_type"])).from_dict(json.loads(json.dumps(raw)))


def new_spelling(raw: dict[str, Any], *, diff: bool) -> dict[str, Any]:
    """config.json as transformers 5 writes it: `rope_parameters`, `dtype`; only what isn't default, or everything."""
    return dict(json.loads(read_by_transformers(raw).to_json_string(use_diff=diff)))


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_shape(name: str) -> None:
    config = parse_config(HUB_CONFIGS[name])
    kinds = "".join("f" if kind == FULL else "s" for kind in config.layer_types[:6])
    assert (
        config.num_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.sliding_window,
        kinds,
        config.tie_word_embeddings,
    ) == EXPECTED[name]
    eos = HUB_CONFIGS[name]["eos_token_id"]
    assert config.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("diff", [True, False], ids=["sparse", "full"])
@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_new_spelling_means_the_same(name: str, diff: bool) -> None:
    raw = new_spelling(HUB_CONFIGS[name], diff=diff)
    assert "rope_parameters" in raw
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & set(raw)
    old, new = parse_config(HUB_CONFIGS[name]), parse_config(raw)
    assert {**vars(new), "ropes": None} == {**vars(old), "ropes": None}
    for kind in set(old.layer_types):
        assert frequencies(new, kind)[1] == frequencies(old, kind)[1]
        torch.testing.assert_close(frequencies(new, kind)[0], frequencies(old, kind)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_agrees_with_transformers(name: str) -> None:
    ours, theirs = parse_config(HUB_CONFIGS[name]), read_by_transformers(HUB_CONFIGS[name])
    window = theirs.sliding_window if hasattr(theirs, "sliding_window") else None
    layer_types = getattr(theirs, "layer_types", None) or [SLIDING if window else FULL] * theirs.num_hidden_layers
    assert list(ours.layer_types) == layer_types
    assert ours.sliding_window == window
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hidden_act == (getattr(theirs, "hidden_act", None) or theirs.hidden_activation)
    scale = getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5
    assert math.isclose(ours.attention_scale, getattr(theirs, "attention_multiplier", scale))
    for factor in ("residual_multiplier", "embedding_multiplier"):
        if hasattr(theirs, factor):
            assert getattr(ours, factor) == getattr(theirs, factor)
    assert math.isclose(ours.logits_multiplier, 1 / getattr(theirs, "logits_scaling", 1))
    rotated = getattr(theirs, "no_rope_layers", [1] * ours.num_layers)
    assert [ours.rotates(layer) for layer in range(ours.num_layers)] == [bool(flag) for flag in rotated]
    for kind in set(layer_types):
        for length in (16, ours.max_position_embeddings):  # LongRoPE has two sets of factors
            mine, scale = frequencies(ours, kind, length)
            wanted, wanted_scale = their_frequencies(theirs, kind, length)
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=0)
            assert math.isclose(scale, wanted_scale)


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_weights_are_those_of_transformers(name: str) -> None:
    theirs = read_by_transformers(HUB_CONFIGS[name])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(theirs).state_dict()
    if theirs.tie_word_embeddings:
        del state["lm_head.weight"]
    config = parse_config(HUB_CONFIGS[name])
    source = with_single_experts(Tensors(state), config)
    assert tensor_shapes(config) == {key: tuple(source.get(key).shape) for key in source.names()}


def test_every_family_has_a_case() -> None:
    assert {raw["model_type"] for raw in HUB_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "", None])
def test_unknown_family_lists_the_families(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        parse_config({"model_type": model_type})
    for family in (repr(str(model_type)), *FAMILIES):
        assert family in str(error.value)


def test_defaults_of_silent_configs() -> None:
    """What transformers assumes for a family where config.json says nothing."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    for model_type in FAMILIES:
        raw = {"model_type": model_type, **sizes}
        ours, theirs = parse_config(raw), read_by_transformers(raw)
        window = getattr(theirs, "sliding_window", None)
        assert ours.sliding_window == window
        types = getattr(theirs, "layer_types", None) or [SLIDING if window else FULL] * 7
        assert list(ours.layer_types) == types
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
        if ours.sparse_layers:
            sizes_of_experts = (ours.num_experts, ours.num_experts_per_tok, ours.norm_topk_prob)
            assert sizes_of_experts == (
                theirs.num_local_experts,
                theirs.num_experts_per_tok,
                getattr(theirs, "norm_topk_prob", True),
            )
            assert ours.moe_intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.hidden_act == (getattr(theirs, "hidden_act", None) or theirs.hidden_activation)
        for kind in set(types):
            torch.testing.assert_close(frequencies(ours, kind)[0], their_frequencies(theirs, kind, 16)[0])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 20}),
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 20}),
        ("Qwen3-0.6B", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("Qwen3-0.6B", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}),
        ("gemma-3-1b-it", {"sliding_window_pattern": 4}),
        ("gemma-3-1b-it", {"sliding_window_pattern": None}),
        ("SmolLM3-3B", {"layer_types": None, "use_sliding_window": True, "sliding_window": 8}),
        ("SmolLM3-3B", {"layer_types": None, "use_sliding_window": False, "sliding_window": None}),
        ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 5, "layer_types": None}),
    ],
)
def test_kinds_of_layers_that_follow_from_other_keys(name: str, changes: dict[str, Any]) -> None:
    raw = {key: value for key, value in {**HUB_CONFIGS[name], **changes}.items() if value is not None}
    if changes.get("sliding_window", 8) is None:
        raw["sliding_window"] = None
    ours, theirs = parse_config(raw), read_by_transformers(raw)
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.sliding_window == theirs.sliding_window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": [FULL] * 3}, "layer_types must name"),
        ({"layer_types": ["chunked_attention"] * 28}, "layer_types must name"),
        ({"layer_types": [SLIDING] * 28}, "sliding_window is not set"),
    ],
)
def test_bad_layer_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**HUB_CONFIGS["Qwen3-0.6B"], **changes})


@pytest.mark.parametrize("flags", [[1, 0], "all", [1] * 35, [1] * 35 + [2], {"0": 1}])
def test_bad_rotated_layers(flags: Any) -> None:
    with pytest.raises(CheckpointError, match="'no_rope_layers' must be a list of 0 or 1 for each of 36 layers"):
        parse_config({**HUB_CONFIGS["SmolLM3-3B"], "no_rope_layers": flags})


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
)
@pytest.mark.parametrize("value", [0, -1.0, "2", float("nan")])
def test_bad_multipliers(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}' must be a positive number"):
        parse_config({**HUB_CONFIGS["granite-3.3-2b-instruct"], key: value})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, range(48)),
        ({"decoder_sparse_step": 3}, range(2, 48, 3)),
        ({"mlp_only_layers": [0, 47, 90]}, range(1, 47)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, range(3, 48, 2)),
        ({"decoder_sparse_step": 49}, ()),
    ],
)
def test_layers_with_experts(changes: dict[str, Any], layers: Iterable[int]) -> None:
    raw = {**HUB_CONFIGS["Qwen3-30B-A3B"], **changes}
    config, theirs = parse_config(raw), read_by_transformers({**raw, "num_experts": 2})
    assert config.sparse_layers == frozenset(layers)
    assert config.num_experts_per_tok == 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs).model
    assert config.sparse_layers == {i for i, layer in enumerate(model.layers) if hasattr(layer.mlp, "experts")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "'num_experts_per_tok' must be at most the number of experts, 4, got 8"),
        ({"num_local_experts": 64}, "num_local_experts and num_experts must be equal"),
        ({"num_experts": 0}, "'num_experts' must be a positive whole number"),
        ({"moe_intermediate_size": "768"}, "'moe_intermediate_size' must be"),
        ({"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false"),
        ({"mlp_only_layers": 3}, "'mlp_only_layers' must be a list of layers"),
        ({"mlp_only_layers": [True]}, "'mlp_only_layers' must be a list of layers"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' must be"),
    ],
)
def test_bad_experts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**HUB_CONFIGS["Qwen3-30B-A3B"], **changes})


def test_either_name_of_the_number_of_experts() -> None:
    raw = {key: value for key, value in HUB_CONFIGS["Qwen3-30B-A3B"].items() if key != "num_experts"}
    for name in ("num_experts", "num_local_experts"):
        assert parse_config({**raw, name: 16}).num_experts == 16


def frequencies(config: ModelConfig, kind: str, length: int = 16) -> tuple[torch.Tensor, float]:
    return inverse_frequencies(config.ropes[kind], length)


def their_frequencies(config: PreTrainedConfig, kind: str, length: int) -> tuple[torch.Tensor, float]:
    nested = kind in config.rope_parameters
    table = config.rope_parameters[kind] if nested else config.rope_parameters
    if table["rope_type"] == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head_dim * table.get("partial_rotary_factor", 1.0))
        return 1.0 / table["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0
    function = ROPE_INIT_FUNCTIONS[table["rope_type"]]
    values, scale = function(config, None, seq_len=length, layer_type=kind if nested else None)
    return values, scale
