"""Attention over keys and values in each format: against torch, beside any neighbours, on any number of threads.

Shapes: B rows, Q tokens, T slots, H query heads, H_kv key/value heads, D_head channels of a head.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache
from layerskip.model.native.library import load_library
from layerskip.model.native.network import NativeNetwork

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
CACHES = ["float32", "bfloat16", "int8"]
LENGTH = 150
"""Tokens of the texts: five pieces of slots, the last one cut."""
SHAPES: dict[str, dict[str, Any]] = {
    "two heads share keys": {"head_dim": 8},
    "one key head, 40 channels": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 40},
    "twelve heads share keys": {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 16},
    "seventy heads share keys": {"num_attention_heads": 70, "num_key_value_heads": 1, "head_dim": 8},
    "own keys": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def load(folder: Path, cache_dtype: str, kernels: str = "native") -> LanguageModel:
    options: dict[str, Any] = {"kernels": kernels, "cache_dtype": cache_dtype}
    return layerskip.load(str(folder), device="cpu", dtype="float32", **options)


def read(lm: LanguageModel, tokens: Tensor, blocks: list[int], cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
    """Hidden states [B, Q, D] of texts that are read in blocks, and their cache."""
    decoder, parts, at = lm.decoder, [], 0
    cache = cache or decoder.new_cache(len(tokens), LENGTH + 10)
    for size in blocks:
        hidden = decoder.embed(tokens[:, at : at + size])
        positions = decoder.place(cache, [at] * len(tokens), size)
        parts.append(decoder.run_layers(hidden, positions, cache, 0, decoder.num_layers))
        at += size
    return torch.cat(parts, 1), cache


def texts(rows: int) -> Tensor:
    return torch.randint(0, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_torch(tiny_checkpoint: Callable[..., Path], shape: str, cache_dtype: str) -> None:
    """Both kinds of kernels round keys and values alike but for numbers that lie in the middle."""
    folder = tiny_checkpoint("qwen3", max_position_embeddings=256, **SHAPES[shape])
    ours, kept = read(load(folder, cache_dtype), texts(2), [100, 1, 5, 44])
    theirs, others = read(load(folder, cache_dtype, "torch"), texts(2), [LENGTH])
    assert kept.keys.dtype == others.keys.dtype == getattr(torch, cache_dtype)
    assert (ours - theirs).norm() < (2e-6 if cache_dtype == "float32" else 2e-3) * theirs.norm()
    for own, other in zip(kept.read(0, 0, LENGTH), others.read(0, 0, LENGTH), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-2 if cache_dtype == "int8" else 1e-4)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_fewer_bits_are_other_numbers_near_by(tiny_checkpoint: Callable[..., Path], cache_dtype: str) -> None:
    folder = tiny_checkpoint(max_position_embeddings=256)
    exact, _ = read(load(folder, "float32"), texts(2), [LENGTH])
    ours, cache = read(load(folder, cache_dtype), texts(2), [LENGTH])
    error = float((ours - exact).norm() / exact.norm())
    assert 0 < error < 0.02
    assert len(cache.buffers) == (4 if cache_dtype == "int8" else 2)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_change_no_bit(
    tiny_checkpoint: Callable[..., Path], threads: int, shape: str, cache_dtype: str
) -> None:
    """A token alone, in a block of verification and in chunks of a prompt; a row alone and beside others."""
    lm = load(tiny_checkpoint("qwen3", max_position_embeddings=256, **SHAPES[shape]), cache_dtype)
    tokens = texts(6)
    wanted, kept = read(lm, tokens, [LENGTH])
    for blocks in ([1] * LENGTH, [64, 5, 5, 1, 33, 42], [16, 17, 31, 32, 2, 3, 4, 45]):
        hidden, cache = read(lm, tokens, blocks)
        assert torch.equal(hidden, wanted)
        assert all(torch.equal(own, other) for own, other in zip(cache.buffers, kept.buffers, strict=True))
    for blocks in ([1] * LENGTH, [LENGTH], [140, 1, 9]):
        assert torch.equal(read(lm, tokens[:1], blocks)[0], wanted[:1])


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_windows(tiny_checkpoint: Callable[..., Path], threads: int, cache_dtype: str) -> None:
    """Layers that see the last few tokens only, whose pieces begin in the middle."""
    lm = load(tiny_checkpoint("mistral", max_position_embeddings=256, sliding_window=40), cache_dtype)
    wanted, _ = read(lm, texts(2), [LENGTH])
    assert torch.equal(read(lm, texts(2), [1] * LENGTH)[0], wanted)
    assert torch.equal(read(lm, texts(2), [90, 5, 55])[0], wanted)
    whole, _ = read(load(tiny_checkpoint("mistral", max_position_embeddings=256), cache_dtype), texts(2), [LENGTH])
    assert not torch.equal(whole, wanted)


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_more_pieces_than_there_is_room_for(tiny_checkpoint: Callable[..., Path], cache_dtype: str) -> None:
    """Members that share a long text's pieces put results together in several goes."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sizes = {"num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 1}
        lm = load(tiny_checkpoint("qwen3", max_position_embeddings=4096, **sizes), cache_dtype)
        decoder, length = lm.decoder, 3000  # 94 pieces of 64 heads; there is room for the results of 62
        assert isinstance(decoder._network, NativeNetwork)
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            cache = decoder.new_cache(1, length + 8)
            for at in range(0, length, 500):
                block = torch.arange(at, at + 500).remainder(90).unsqueeze(0)
                decoder.run_layers(decoder.embed(block), decoder.place(cache, [at], 500), cache, 0, 1)
            hidden = decoder.embed(torch.tensor([[3]]))
            results.append(decoder.run_layers(hidden, decoder.place(cache, [length], 1), cache, 0, 1))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_what_is_not_finite_does_not_stay_unnoticed(tiny_checkpoint: Callable[..., Path], cache_dtype: str) -> None:
    for kernels in ("native", "torch"):
        decoder = load(tiny_checkpoint(), cache_dtype, kernels).decoder
        for number in (torch.nan, torch.inf):
            cache = decoder.new_cache(1, 8)
            hidden = decoder.embed(torch.tensor([[1, 2]]))
            hidden[0, 0, 3] = number
            out = decoder.run_layers(hidden, decoder.place(cache, [0], 2), cache, 0, decoder.num_layers)
            assert not out[0, 1].isfinite().all()


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_head_of_zeros(tiny_checkpoint: Callable[..., Path], kernels: str) -> None:
    """Scales of zeros: nothing is divided by them."""
    decoder = load(tiny_checkpoint(), "int8", kernels).decoder
    cache = decoder.new_cache(1, 8)
    hidden = torch.zeros_like(decoder.embed(torch.tensor([[1, 2]])))
    out = decoder.run_layers(hidden, decoder.place(cache, [0], 2), cache, 0, decoder.num_layers)
    assert out.isfinite().all()
    assert not cache.keys[:, 0, :2].any()
