"""Keys and values in fewer bits: other numbers, and within them the same text however it is decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_tiny_adapters
from engines import drain
from everywhere import same_everywhere

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixBlocks
from layerskip.decoding.request import make_request
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.native.library import load_library

KERNELS = ["torch", *(["native"] if load_library() is not None else [])]
CACHES = ["bfloat16", "int8"]
SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}


def load(folder: Path, kernels: str, cache_dtype: str, **options: Any) -> LanguageModel:
    chosen: dict[str, Any] = {"kernels": kernels, "cache_dtype": cache_dtype, **options}
    return layerskip.load(str(folder), device="cpu", dtype="float32", **chosen)


@pytest.fixture(scope="module", params=[(kernels, cache) for kernels in KERNELS for cache in CACHES], ids="-".join)
def lm(lm_folder: Path, request: pytest.FixtureRequest) -> LanguageModel:
    return load(lm_folder, *request.param)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.2}], ids=["greedy", "coupled", "penalty"])
def test_the_text_stays(lm: LanguageModel, prompts: list[list[int]], options: dict[str, Any]) -> None:
    """Ragged batches, all exits and lengths."""
    assert same_everywhere(lm, lm, prompts, **options) > 0


def test_batches_and_single_rows_agree(lm: LanguageModel, prompts: list[list[int]]) -> None:
    together = lm.generate(prompts, exit_layer=1, num_speculations=3, max_new_tokens=20)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = lm.generate([prompt], generation_strategy="autoregressive", max_new_tokens=20)
        assert result.token_ids == alone.token_ids


def test_a_full_cache(lm: LanguageModel, prompts: list[list[int]]) -> None:
    """Until the context is used up, which drafts reach beyond."""
    options: dict[str, Any] = {"max_new_tokens": 1000, "ignore_eos": True}
    expected = lm.generate(prompts[2:], generation_strategy="autoregressive", **options)
    ours = lm.generate(prompts[2:], exit_layer=2, num_speculations=6, **options)
    assert len(prompts[2]) + len(ours[0].token_ids) >= lm.decoder.max_context
    assert ours[0].token_ids == expected[0].token_ids


def test_a_text_that_ends_inside_a_draft(lm: LanguageModel, prompts: list[list[int]]) -> None:
    (free,) = lm.generate(prompts[:1], generation_strategy="autoregressive", max_new_tokens=12)
    options: dict[str, Any] = {"eos_token_ids": (free.token_ids[5],), "max_new_tokens": 12}
    (plain,) = lm.generate(prompts[:1], generation_strategy="autoregressive", **options)
    (ours,) = lm.generate(prompts[:1], exit_layer=2, num_speculations=6, **options)
    assert ours.token_ids == plain.token_ids
    (one,) = lm.generate(prompts[:1], exit_layer=2, num_speculations=6, max_new_tokens=1)
    assert one.token_ids == free.token_ids[:1]


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_exit_adapters(
    lm_folder: Path, tmp_path: Path, prompts: list[list[int]], kernels: str, cache_dtype: str
) -> None:
    """Adapters have keys of their own, and read values of later layers."""
    write_tiny_adapters(tmp_path, lm_folder, exits=(1, 3))
    adapted = load(lm_folder, kernels, cache_dtype, exit_adapters=tmp_path)
    plain = load(lm_folder, kernels, cache_dtype)
    assert adapted.decoder.adapted_exits == (1, 3)
    for options in ({}, SAMPLED):
        same_everywhere(adapted, plain, prompts, **options)


def test_beginnings_from_blocks(lm: LanguageModel, prompts: list[list[int]]) -> None:
    """Keys and values that were copied to blocks and back, with their scales."""
    decoder, prompt = lm.decoder, prompts[2]
    wanted = lm.generate([prompt], generation_strategy="autoregressive", max_new_tokens=12)[0].token_ids
    engine = Engine(
        decoder,
        max_rows=2,
        capacity=decoder.max_context,
        prefix_blocks=PrefixBlocks(max_bytes=64 * 4 * decoder.token_bytes, block_tokens=4),
        experience=lm._experience,
    )
    config = GenerationConfig(exit_layer=2, num_speculations=3, max_new_tokens=12)
    for _ in range(2):
        row = engine.add(make_request(decoder, prompt, config, seed=0))
        drain(engine)
        assert row.tokens[len(prompt) :] == wanted
    blocks = engine._slots.blocks
    assert blocks is not None
    assert blocks.counts.hits == 12


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_whole_rounds(
    lm_folder: Path, load_static: Callable[..., LanguageModel], prompts: list[list[int]], cache_dtype: str
) -> None:
    """Rounds as one function of tensors, over buffers that outlive their texts."""
    static = load_static(lm_folder, cache_dtype=cache_dtype)
    assert isinstance(static.decoder, GraphDecoder)
    same_everywhere(static, load(lm_folder, "torch", cache_dtype), prompts)
    assert static.decoder.compiled


def test_what_is_not_known(lm_folder: Path) -> None:
    with pytest.raises(
        InvalidArgumentError, match="cache_dtype 'int4' is not known; use auto, float32, bfloat16, int8"
    ):
        load(lm_folder, "torch", "int4")
    with pytest.raises(InvalidArgumentError, match="cache_dtype must be a text, got 8"):
        load(lm_folder, "torch", 8)  # type: ignore[arg-type]
