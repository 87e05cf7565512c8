"""The options of loading, in a config, as keyword arguments, or both."""

from typing import Any

import pytest

import layerskip
from layerskip.checkpoint.loading.config import LoadingConfig, make_loading_config
from layerskip.errors import InvalidArgumentError


def test_arguments_win_over_a_config() -> None:
    config = LoadingConfig(dtype="bfloat16", max_context=64)
    assert make_loading_config(None, {}) == LoadingConfig()
    assert make_loading_config(config, {}) == config
    assert make_loading_config(None, {"dtype": "bfloat16", "max_context": 64}) == config
    assert make_loading_config(config, {"max_context": 32}) == LoadingConfig(dtype="bfloat16", max_context=32)


def test_loading_by_a_config() -> None:
    config = LoadingConfig(dtype="float32", device="cpu", kernels="torch", max_context=64)
    for lm in (
        layerskip.load("demo", config),
        layerskip.load("demo", dtype="float32", device="cpu", kernels="torch", max_context=64),
    ):
        assert (lm.decoder.kernels, lm.decoder.max_context) == ("torch", 64)
    assert layerskip.load("demo", config, max_context=32).decoder.max_context == 32


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {"nope": 1}, r"unknown option 'nope'; known: revision, dtype, device, .*compile$"),
        ({"dtype": "float32"}, {}, "config must be a LoadingConfig, got dict"),
        (None, {"max_context": 1.5}, "max_context"),
        (None, {"draft_text": 3}, "draft_text must be the path of a file, got 3"),
    ],
)
def test_options_that_are_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        layerskip.load("demo", config, **options)
