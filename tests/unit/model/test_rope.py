"""Rotary embeddings: the tables, the rotation, and what config.json may say about them."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from layerskip.errors import CheckpointError, UnsupportedModelError
from layerskip.model.config.rope import ROPE_TYPES, RopeConfig, parse_rope
from layerskip.model.rope import RopeTable, inverse_frequencies, rotate

HEAD_DIM = 16
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def parse(parameters: dict[str, Any], *, partial: float = 1.0, original: int | None = None) -> RopeConfig:
    return parse_rope(
        parameters,
        head_dim=HEAD_DIM,
        rope_theta=500.0,
        partial_rotary_factor=partial,
        max_position_embeddings=128,
        original_max_position_embeddings=original,
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4,
            "beta_slow": 2,
            "attention_factor": 1.3,
        },
        {**LONG, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rotation_equals_transformers(parameters: dict[str, Any]) -> None:
    """At every position of the context, most of them beyond the original one."""
    table = RopeTable(parse(parameters), 128, torch.float32, CPU)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 500.0, **parameters},
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 128, 4, HEAD_DIM, generator=generator)
    cos, sin = LlamaRotaryEmbedding(config)(query, torch.arange(128).unsqueeze(0))
    wanted, _ = apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)
    ours = rotate(query, table.cos.view(1, 128, 1, -1), table.sin.view(1, 128, 1, -1))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert (ours - query).abs().max() > 1


def test_only_the_first_channels_are_rotated() -> None:
    table = RopeTable(parse({}, partial=0.5), 32, torch.float32, CPU)
    assert table.rotary_dim == 8
    assert table.cos.shape == (32, 8)
    x = torch.randn(1, 32, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = table.cos.view(1, 32, 1, -1), table.sin.view(1, 32, 1, -1)
    out = rotate(x, cos, sin)
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.equal(out[..., :8], rotate(x[..., :8].contiguous(), cos, sin))
    pairs, turned = (torch.complex(t[..., :4], t[..., 4:8]) for t in (x, out))
    angles = torch.arange(32.0).view(1, 32, 1, 1) / 500 ** (torch.arange(4) / 4)
    torch.testing.assert_close(turned, pairs * torch.polar(torch.ones(()), angles), rtol=0, atol=1e-5)


def test_longrope_takes_its_factors_by_the_context() -> None:
    config = parse({**LONG, "original_max_position_embeddings": 32})
    short, scale = inverse_frequencies(config, 32)
    long, long_scale = inverse_frequencies(config, 33)
    torch.testing.assert_close(short, long * 2)
    assert scale == long_scale == math.sqrt(1 + math.log(128 / 32) / math.log(32))


def test_16_bit_tables_are_computed_in_float32() -> None:
    exact, table = (RopeTable(parse({}), 128, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(table.cos, exact.cos.bfloat16())
    assert torch.equal(table.sin, exact.sin.bfloat16())


def test_the_config_s_own_original_context_wins() -> None:
    assert parse(LLAMA3).original_max_position_embeddings == 32
    assert parse(LLAMA3, original=64).original_max_position_embeddings == 64
    assert parse({}).original_max_position_embeddings == 128


def test_old_names() -> None:
    assert parse({"type": "linear", "factor": 2.0}) == parse({"rope_type": "linear", "factor": 2.0})
    assert parse({**LONG, "rope_type": "su"}).rope_type == "longrope"


def test_the_table_s_own_base_and_share_win() -> None:
    config = parse({"rope_theta": 10.0, "partial_rotary_factor": 0.25}, partial=0.5)
    assert (config.rope_theta, config.rotary_dim) == (10.0, 4)


def test_null_parameters_are_as_good_as_absent() -> None:
    assert parse({"rope_type": "linear", "factor": 2.0, "beta_fast": None}).scaling == {"factor": 2.0}


def test_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        parse({"rope_type": "dynamic", "factor": 2.0})
    for name in ("'dynamic'", *ROPE_TYPES):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, ("'beta_fast'", "'linear'", "factor")),
        ({"rope_type": "default", "mrope_section": [2, 3]}, ("'mrope_section'", "'default'")),
        ({**LLAMA3, "extra": 1}, ("'extra'", "'llama3'", "low_freq_factor")),
    ],
)
def test_unknown_parameters(parameters: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        parse(parameters)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "linear"}, ("'factor'", "missing", "'linear'")),
        ({**LLAMA3, "low_freq_factor": None}, ("'low_freq_factor'", "missing")),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, ("'long_factor'", "missing")),
        ({**LONG, "long_factor": [1.0] * 7}, ("'long_factor'", "8 numbers")),
        ({**LONG, "short_factor": ["1"] * 8}, ("'short_factor'", "positive number", "'1'")),
        ({"rope_type": "linear", "factor": "4"}, ("'factor'", "'4'")),
        ({"partial_rotary_factor": 0.2}, ("partial_rotary_factor", "even")),
        ({"partial_rotary_factor": 1.5}, ("partial_rotary_factor",)),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as error:
        parse(parameters)
    for word in words:
        assert word in str(error.value)
