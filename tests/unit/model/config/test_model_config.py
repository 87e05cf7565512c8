"""config.json is read strictly: what isn't understood and might change the model is refused, by name and value."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip.errors import CheckpointError, InvalidArgumentError, UnsupportedModelError
from layerskip.model.config import keys as config_keys
from layerskip.model.config.families import parse_config
from layerskip.model.config.keys import INERT_KEYS, NEUTRAL_VALUES, declared_keys
from layerskip.model.config.model_config import ModelConfig, read_eos

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def parse(model_type: str = "llama", **changes: Any) -> ModelConfig:
    return parse_config({"model_type": model_type, **SIZES, **changes})


def refusal(error: type[Exception], model_type: str = "llama", **changes: Any) -> str:
    with pytest.raises(error) as caught:
        parse(model_type, **changes)
    return str(caught.value)


def test_a_key_of_another_program_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """What transformers' class doesn't declare can't change what transformers computes."""
    keys = {"_model_name_or_path": "x", "unk_token_id": 0, "use_parallel_residual": True, "my.tool": {"a": [1]}}
    with caplog.at_level(logging.INFO, "layerskip"):
        assert parse(**keys) == parse()
    assert all(repr(key) in caplog.text for key in keys)


def test_keys_that_transformers_ignores_do_so_there_too() -> None:
    """The rule, held against transformers itself: such a key changes no logit there."""
    ids = torch.tensor([[5, 3, 80]])
    logits = []
    for extra in ({}, {"use_parallel_residual": True, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 9}):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, **extra))
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_a_key_that_transformers_declares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = {**declared_keys("llama"), "use_parallel_residual": False, "logit_scale": 1.0}
    monkeypatch.setattr(config_keys, "declared_keys", lambda model_type: declared)
    message = refusal(UnsupportedModelError, use_parallel_residual=True)
    assert "'use_parallel_residual' = True" in message
    assert "'llama'" in message
    assert "remove it from config.json" in message
    assert parse(use_parallel_residual=False, logit_scale=1.0) == parse()  # what would be so without them


def test_declared_keys_are_those_of_the_class() -> None:
    declared = declared_keys("qwen3")
    assert {"hidden_size", "use_sliding_window", "head_dim"} <= set(declared)
    assert "final_logit_softcapping" not in declared


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "sliding_window", 128),  # code that all families of transformers share looks for these
        ("qwen2", "attention_chunk_size", 64),
        ("phi3", "layer_types", ["full_attention"] * 3),
        ("llama", "attn_logit_softcapping", 30.0),
    ],
)
def test_keys_that_count_in_every_family(model_type: str, key: str, value: Any) -> None:
    assert key in refusal(UnsupportedModelError, model_type, **{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", ["1e-5", float("nan"), float("inf"), 0, -1.0, True, [1], 10**400])
def test_numbers_must_be_positive_and_finite(key: str, value: Any) -> None:
    message = refusal(CheckpointError, **{key: value})
    assert key in message
    assert "positive number" in message
    assert len(message) < 200


@pytest.mark.parametrize("value", ["yes", 1, 0.0, []])
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_flags_must_be_truth_values(key: str, value: Any) -> None:
    assert f"'{key}' must be true or false" in refusal(CheckpointError, **{key: value})


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("max_position_embeddings", 10**12)])
def test_sizes_beyond_all_measure(key: str, value: int) -> None:
    assert key in refusal(CheckpointError, **{key: value})


@pytest.mark.parametrize("factor", [0, -2.0, float("nan"), "4", None])
def test_scaling_factors_must_be_positive(factor: Any) -> None:
    for scaling in (
        {"rope_type": "linear", "factor": factor},
        {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ):
        assert "factor" in refusal(CheckpointError, rope_scaling=scaling)
    same = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
    assert "must be larger" in refusal(CheckpointError, rope_scaling=same)


def test_null_is_as_good_as_absent() -> None:
    assert parse(attention_chunk_size=None, quantization_config=None, sliding_window=None) == parse()


def test_inert_keys_change_nothing() -> None:
    inert = dict.fromkeys(INERT_KEYS - {"model_type", "bos_token_id", "eos_token_id"}, "anything")
    assert parse(**inert) == parse()


@pytest.mark.parametrize("key", NEUTRAL_VALUES)
def test_neutral_values(key: str) -> None:
    assert parse("mistral", **{key: NEUTRAL_VALUES[key][0]}) == parse("mistral")
    message = refusal(UnsupportedModelError, "mistral", **{key: 2.5})
    assert f"{key} = 2.5" in message
    assert "'mistral'" in message


def test_biases_where_a_family_has_them() -> None:
    llama = parse(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse("qwen2")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    assert "attention_bias = True" in refusal(UnsupportedModelError, "phi3", attention_bias=True)


@pytest.mark.parametrize("given", [{"quant_method": "bitsandbytes", "bits": 4}, {}, "fp8"])
def test_quantized_checkpoints_are_refused(given: Any) -> None:
    message = refusal(UnsupportedModelError, quantization_config=given)
    assert "quantized" in message
    assert "original checkpoint" in message
    if given:
        assert ("bitsandbytes" if isinstance(given, dict) else "fp8") in message


@pytest.mark.parametrize("key", [key for key in SIZES if key != "num_key_value_heads"])
@pytest.mark.parametrize("value", [None, 0, -4, "64", 64.0, True])
def test_sizes_must_be_positive_whole_numbers(key: str, value: Any) -> None:
    message = refusal(CheckpointError, **{key: value})
    assert repr(key) in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"num_key_value_heads": 3}, ("4 is not a multiple of 3",)),
        ("llama", {"num_key_value_heads": "2"}, ("'num_key_value_heads'", "'2'")),
        ("llama", {"head_dim": -8}, ("'head_dim'", "-8")),
        ("mistral", {"sliding_window": 0}, ("'sliding_window'", "0")),
        ("qwen2", {"sliding_window": "all", "use_sliding_window": True}, ("'sliding_window'", "'all'")),
        ("gemma3_text", {"sliding_window": None}, ("sliding_window is not set",)),
        ("llama", {"hidden_act": "relu2"}, ("'relu2'", "silu", "gelu_pytorch_tanh")),
        ("llama", {"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'")),
        ("llama", {"rope_scaling": "linear"}, ("must be an object", "'linear'")),
    ],
)
def test_nonsense(model_type: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refusal(CheckpointError, model_type, **changes)
    for word in words:
        assert word in message


def test_missing_kv_heads_mean_as_many_as_heads() -> None:
    assert parse(num_key_value_heads=None).num_key_value_heads == 4


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (3, (3,)), ([3, 5], (3, 5)), (0, (0,)), ([], ())])
def test_end_of_sequence_ids(given: Any, ids: tuple[int, ...]) -> None:
    assert read_eos({"eos_token_id": given}) == ids


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_exit_layers_within_the_network(exit_layer: int) -> None:
    assert parse().check_exit_layer(exit_layer) == exit_layer


@pytest.mark.parametrize("exit_layer", [0, 4, -1, 1.0, True, "2"])
def test_exit_layers_beyond_it(exit_layer: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="exit_layer") as caught:
        parse().check_exit_layer(exit_layer)
    assert str(exit_layer) in str(caught.value)
