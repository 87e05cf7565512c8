"""Libraries for several instruction sets: the same bits from each of them that this processor can run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from gguf import GGMLQuantizationType
from k_quants import quantize
from torch import Tensor

import layerskip
from layerskip.model.blocks import BLOCK_BYTES, BLOCK_WEIGHTS, BlockWeight
from layerskip.model.choosing.noise import Purpose, make_key
from layerskip.model.native import sampling
from layerskip.model.native.library import FORMATS, find_variants, load_library
from layerskip.model.native.linear import INT8_STORAGES, NativeLinear

TARGETS = [variant.target for variant in find_variants() if variant.library is not None]
pytestmark = pytest.mark.skipif(len(TARGETS) < 2, reason="this processor runs one library")
Result = TypeVar("Result")
WithAll = Callable[[Callable[[], Result]], list[Result]]
"""Calls a function once with each library and returns all results."""


@pytest.fixture
def with_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[WithAll[Result]]:
    def call(function: Callable[[], Result]) -> list[Result]:
        results = []
        for target in TARGETS:
            monkeypatch.setenv("LAYERSKIP_CPU", target)
            load_library.cache_clear()
            results.append(function())
        return results

    yield call
    load_library.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(results: list[Tensor]) -> bool:
    """Whether all libraries have given the same bits."""
    return all(torch.equal(results[0], other) for other in results[1:])


def make(storage: str, outputs: int, inputs: int, compute: str) -> NativeLinear:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    if storage in BLOCK_BYTES and storage != "int4":
        data = quantize(weight.numpy(), GGMLQuantizationType[storage.upper()])
        return NativeLinear(BlockWeight(storage, torch.from_numpy(data)), bias=bias, compute=compute)  # type: ignore[arg-type]
    weight = weight.half().float() if storage == "float16" else weight
    return NativeLinear(weight, bias=bias, storage=storage, compute=compute)


@pytest.mark.parametrize(
    ("storage", "compute"),
    [
        *((name, "float32") for name in FORMATS if name not in ("stacked", "alternating")),
        *((name, "int8") for name in INT8_STORAGES),
        ("bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("inputs", [32, 96, 576])
def test_products(with_all: WithAll[list[Tensor]], storage: str, compute: str, inputs: int) -> None:
    """Any number of tokens and of panels, in tiles of all sizes."""
    if storage in BLOCK_WEIGHTS:
        inputs = 256 * (inputs // 256 + 1)

    def products() -> list[Tensor]:
        found = []
        for panels in (1, 2, 3, 4, 5, 7, 11):
            linear = make(storage, 16 * panels - 3, inputs, compute)
            alone = torch.cat([linear(row) for row in random(21, inputs, seed=2).split(1)])
            for rows in (*range(1, 14), 21):
                found.append(linear(random(21, inputs, seed=2)[:rows]))
                assert torch.equal(found[-1], alone[:rows])
        return found

    assert all(same(list(each)) for each in zip(*with_all(products), strict=True))


@pytest.mark.parametrize(
    ("family", "quantize", "compute"),
    [
        ("llama", None, "float32"),
        ("llama", "int8", "float32"),
        ("llama", "int4", "float32"),
        ("llama", "int8", "int8"),
        ("llama", None, "bfloat16"),
        ("qwen3_moe", None, "bfloat16"),
        ("olmo2", None, "float32"),
        ("granite", None, "float32"),
        ("qwen3_moe", None, "float32"),
        ("mixtral", "int8", "int8"),
    ],
)
def test_a_network(
    with_all: WithAll[Tensor],
    tiny_checkpoint: Callable[..., Path],
    family: str,
    quantize: str | None,
    compute: str,
) -> None:
    folder = str(tiny_checkpoint(family))
    tokens = torch.randint(0, 96, (90,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits() -> Tensor:
        lm = layerskip.load(folder, kernels="native", quantize=quantize, compute=compute)  # type: ignore[arg-type]
        return lm.logits(tokens)

    assert same(with_all(logits))


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
def test_attention(with_all: WithAll[Tensor], tiny_checkpoint: Callable[..., Path], cache_dtype: str) -> None:
    """Prompts and single tokens, over keys and values in each format."""
    sizes = {"head_dim": 40, "num_attention_heads": 6, "max_position_embeddings": 256}
    folder = str(tiny_checkpoint("qwen3", **sizes))

    def states() -> Tensor:
        decoder = layerskip.load(folder, kernels="native", cache_dtype=cache_dtype).decoder  # type: ignore[arg-type]
        cache, parts, at = decoder.new_cache(2, 160), [], 0
        for size in (70, 1, 5, 2, 60):
            block = torch.randint(0, 96, (2, size), generator=torch.Generator().manual_seed(at))
            hidden = decoder.embed(block)
            parts.append(decoder.run_layers(hidden, decoder.place(cache, [at, at], size), cache, 0, decoder.num_layers))
            at += size
        return torch.cat(parts, 1)

    assert same(with_all(states))


def test_noise(with_all: WithAll[Tensor]) -> None:
    keys = [[make_key(5, Purpose.TARGET, position) for position in range(4)]]
    assert same(with_all(lambda: sampling.gumbel(keys, 1003)))
