"""Choosing device, dtype and context."""

import pytest
import torch

from layerskip.checkpoint.loading.placement import choose_context, choose_device, choose_dtype
from layerskip.errors import InvalidArgumentError
from layerskip.model.config.families import parse_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("gpu", "cpu:x", "", "meta", "cuda:99"):
        with pytest.raises(InvalidArgumentError) as error:
            choose_device(device)
        assert repr(device) in str(error.value)


def test_dtypes() -> None:
    assert choose_dtype("bfloat16", CPU, {}) == torch.bfloat16
    assert choose_dtype("auto", CPU, {"dtype": "bfloat16"}) == torch.float32
    assert choose_dtype("auto", CUDA, {"dtype": "bfloat16"}) == torch.bfloat16
    assert choose_dtype("auto", CUDA, {"torch_dtype": "float16"}) == torch.float16
    assert choose_dtype("auto", CUDA, {}) == torch.float32
    with pytest.raises(InvalidArgumentError, match=r"dtype 'int8'.*auto, float32, bfloat16, float16"):
        choose_dtype("int8", CPU, {})


def test_contexts() -> None:
    raw = {
        "model_type": "phi3",
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
    }
    assert choose_context(parse_config(raw), None) == 64
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = parse_config({**raw, "rope_scaling": scaling})
    assert choose_context(config, None) == 16
    assert choose_context(config, 64) == 64
    assert choose_context(config, 1) == 1
    for bad in (0, -1, 65):
        with pytest.raises(InvalidArgumentError, match=rf"max_context {bad} is outside 1\.\.64"):
            choose_context(config, bad)
