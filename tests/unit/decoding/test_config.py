"""GenerationConfig refuses bad values by name, and merges with keyword arguments."""

import dataclasses
import math
from typing import Any

import pytest

from layerskip import GenerationConfig
from layerskip.decoding.config import make_config
from layerskip.errors import InvalidArgumentError, LayerSkipError

WHOLE = ["max_new_tokens", "num_speculations", "top_k", "no_repeat_ngram_size", "exit_layer", "seed"]
REAL = ["temperature", "top_p", "min_p", "repetition_penalty"]
COUNTED = ["frequency_penalty", "presence_penalty"]

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in WHOLE for value in (-1, 1.0, True, "3", math.nan)),
    *((name, 0) for name in ("max_new_tokens", "num_speculations", "exit_layer")),
    *((name, None) for name in ("max_new_tokens", "top_k")),
    *((name, value) for name in REAL for value in (math.nan, math.inf, -math.inf, -0.1, "1", True, 1j, 10**400)),
    *((name, None) for name in REAL[1:]),
    *((name, value) for name in COUNTED for value in (math.nan, math.inf, -2.1, 2.01, "1", True, 1j, None)),
    *(("logprobs", value) for value in (-1, 21, 1.0, True, "3")),
    *(("logit_bias", value) for value in (5, None, "ab", (5,), ((1, 2, 3),))),
    ("seed", 2**63),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", 1.01),
    ("repetition_penalty", 0.0),
    ("generation_strategy", "beam"),
    ("acceptance", "greedy"),
    ("acceptance", ""),
    ("do_sample", 1),
    ("do_sample", "yes"),
    ("block_verification", None),
    ("ignore_eos", 0),
    ("stop", ""),
    ("stop", ("a", "")),
    ("stop", (1,)),
    ("stop", None),
    ("stop", 5),
    ("eos_token_ids", -1),
    ("eos_token_ids", (1, -1)),
    ("eos_token_ids", True),
    ("eos_token_ids", "1"),
    ("eos_token_ids", (1.5,)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        GenerationConfig(**{name: value})
    assert str(caught.value).startswith(name)
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, LayerSkipError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("num_speculations", 1),
        ("exit_layer", 1),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("temperature", 0),
        ("temperature", 0.0),
        ("top_p", 1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("logprobs", 0),
        ("logprobs", 20),
        ("logit_bias", ()),
        ("logit_bias", ((0, -100.0), (7, 100.0))),
        ("eos_token_ids", (0,)),
        ("eos_token_ids", ()),
        ("do_sample", None),
    ],
)
def test_values_at_the_limits_are_allowed(name: str, value: Any) -> None:
    assert getattr(GenerationConfig(**{name: value}), name) == value


def test_biases_become_pairs_by_token() -> None:
    assert GenerationConfig(logit_bias={9: 1, 2: -3.5}).logit_bias == ((2, -3.5), (9, 1.0))
    assert GenerationConfig(logit_bias=[[9, 1], [2, -3.5]]).logit_bias == ((2, -3.5), (9, 1.0))


@pytest.mark.parametrize(
    ("biases", "words"),
    [
        ({-1: 1.0}, ["token id", "-1"]),
        ({1.5: 1.0}, ["token id", "1.5"]),
        ({"7": 1.0}, ["token id", "'7'"]),
        ({7: 100.5}, ["token 7", "from -100 to 100", "100.5"]),
        ({7: math.nan}, ["token 7", "nan"]),
        ({7: "x"}, ["token 7", "'x'"]),
        ([(7, 1.0), (7, 2.0)], ["token 7 twice"]),
    ],
    ids=str,
)
def test_a_bad_bias_is_refused(biases: Any, words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        GenerationConfig(logit_bias=biases)
    assert str(caught.value).startswith("logit_bias")
    assert all(word in str(caught.value) for word in words)


def test_single_values_become_tuples() -> None:
    config = GenerationConfig(stop="END", eos_token_ids=5)
    assert (config.stop, config.eos_token_ids) == (("END",), (5,))
    assert GenerationConfig(stop=["a", "b"], eos_token_ids=[1, 2]).stop == ("a", "b")
    assert hash(config) == hash(GenerationConfig(stop=("END",), eos_token_ids=(5,)))


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0, "do_sample": True, "top_k": 5}, False),
        ({"temperature": 1e-9, "do_sample": True}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"seed": 3}, False),
    ],
)
def test_when_it_samples(options: dict[str, Any], samples: bool) -> None:
    assert GenerationConfig(**options).samples is samples


def test_config_and_arguments_are_merged() -> None:
    config = GenerationConfig(max_new_tokens=7, temperature=0.5)
    assert make_config(None, {}) == GenerationConfig()
    assert make_config(config, {}) == config
    merged = make_config(config, {"temperature": 0.9, "stop": "x"})
    assert (merged.max_new_tokens, merged.temperature, merged.stop) == (7, 0.9, ("x",))
    assert config.temperature == 0.5  # the given one is unchanged


def test_merging_checks_too() -> None:
    with pytest.raises(InvalidArgumentError, match="top_p must be above 0"):
        make_config(GenerationConfig(), {"top_p": 0})


def test_an_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown option 'max_tokens'.*max_new_tokens"):
        make_config(None, {"max_tokens": 3})


def test_a_config_must_be_one() -> None:
    with pytest.raises(InvalidArgumentError, match="GenerationConfig, got dict"):
        make_config({"top_k": 3}, {})


def test_autoregressive_decoding_runs_all_layers() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'autoregressive' .* exit_layer is 3; use .*'early_exit'"):
        GenerationConfig(generation_strategy="autoregressive", exit_layer=3)
    with pytest.raises(InvalidArgumentError, match="'early_exit'"):
        make_config(GenerationConfig(exit_layer=3), {"generation_strategy": "autoregressive"})


@pytest.mark.parametrize(
    ("options", "strategy", "speculates"),
    [
        ({}, "adaptive", True),
        ({"exit_layer": 2}, "self_speculative", True),
        ({"num_speculations": 2}, "self_speculative", True),
        ({"generation_strategy": "adaptive", "exit_layer": 2}, "adaptive", True),
        ({"generation_strategy": "ngram"}, "ngram", True),
        ({"generation_strategy": "autoregressive"}, "autoregressive", False),
        ({"generation_strategy": "early_exit", "exit_layer": 2}, "early_exit", False),
    ],
)
def test_which_strategy_is_meant(options: dict[str, Any], strategy: str, speculates: bool) -> None:
    config = GenerationConfig(**options)
    assert (config.strategy, config.speculates) == (strategy, speculates)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().top_k = 3
