"""What is understood of a `quantization_config`, and what is refused."""

from typing import Any

import pytest
from quantized_files import describe

from layerskip.checkpoint.quantized.scheme import read_scheme
from layerskip.errors import UnsupportedModelError


def compressed(**changes: Any) -> dict[str, Any]:
    given = describe("pack-quantized", 4, 128, symmetric=True)
    group = given["config_groups"]["group_0"]
    for key, value in changes.items():
        place = given if key in ("format", "kv_cache_scheme", "transform_config", "sparsity_config") else group
        place = group["weights"] if key in ("num_bits", "type", "strategy", "actorder") else place
        place[key] = value
    return given


def test_names_count_before_patterns_and_those_before_classes() -> None:
    given = compressed()
    weights = given["config_groups"]["group_0"]["weights"]
    given["config_groups"]["group_1"] = {"targets": ["re:.*mlp.*"], "weights": {**weights, "group_size": 64}}
    given["config_groups"]["group_2"] = {"targets": ["a.mlp.up_proj"], "weights": {**weights, "group_size": 32}}
    scheme = read_scheme(given)
    sizes = [scheme.of(name).group_size for name in ("a.mlp.up_proj", "a.mlp.down_proj", "a.self_attn.q_proj")]
    assert sizes == [32, 64, 128]
    assert scheme.name == "pack-quantized, 4 bits"


def test_a_module_without_a_target_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no target for 'model\.x'"):
        read_scheme(compressed(targets=["re:.*mlp.*"])).of("model.x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("awq", "quantization_config 'awq'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        (compressed(format="float-quantized"), "format 'float-quantized'"),
        (compressed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(format="marlin-24"), "format 'marlin-24'"),
        (compressed(type="float"), "type 'float'"),
        (compressed(num_bits=3), "num_bits 3"),
        (compressed(strategy="block"), "strategy 'block'"),
        (compressed(input_activations={"num_bits": 8}), "input_activations"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (describe("gptq", 3, 128, symmetric=True), "bits 3"),
        (describe("gptq", 4, 128, symmetric=True, checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        (describe("gptq", 4, 0, symmetric=True), "group_size 0"),
        (describe("awq", 4, 128, symmetric=False, version="gemv"), "version 'gemv'"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "Int4WeightOnly"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}}},
            "weight_dtype 'None'",
        ),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "quant_type 'int4_weight_only'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_scheme(given)
    assert "take the original checkpoint" in str(caught.value)
