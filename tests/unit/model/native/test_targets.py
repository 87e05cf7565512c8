"""Libraries for several instruction sets: the same bits from each of them that this processor can run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

import layerskip
from layerskip.errors import InvalidArgumentError
from layerskip.model.blocks import BLOCK_BYTES, BlockWeight
from layerskip.model.native import sampling
from layerskip.model.native.library import FORMATS, LIBRARIES, load_library
from layerskip.model.native.linear import NativeLinear
from layerskip.model.noise import Purpose, make_key


def can_run(target: str) -> bool:
    try:
        return load_library(LIBRARIES, target) is not None
    except InvalidArgumentError:
        return False


pytestmark = pytest.mark.skipif(not (can_run("avx2") and can_run("avx512")), reason="this processor runs one library")
Result = TypeVar("Result")
WithBoth = Callable[[Callable[[], Result]], list[Result]]
"""Calls a function once with each library and returns both results."""


@pytest.fixture
def with_both(monkeypatch: pytest.MonkeyPatch) -> Iterator[WithBoth[Result]]:
    def call(function: Callable[[], Result]) -> list[Result]:
        results = []
        for target in ("avx2", "avx512"):
            monkeypatch.setenv("LAYERSKIP_CPU", target)
            load_library.cache_clear()
            results.append(function())
        return results

    yield call
    load_library.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(storage: str, outputs: int, inputs: int) -> NativeLinear:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    if storage in BLOCK_BYTES:
        data = quantize(weight.numpy(), GGMLQuantizationType[storage.upper()])
        return NativeLinear(BlockWeight(storage, torch.from_numpy(data)), bias=bias)  # type: ignore[arg-type]
    return NativeLinear(weight.half().float() if storage == "float16" else weight, bias=bias, storage=storage)


@pytest.mark.parametrize("storage", list(FORMATS))
@pytest.mark.parametrize("inputs", [32, 96, 576])
def test_products(with_both: WithBoth[list[Tensor]], storage: str, inputs: int) -> None:
    """Any number of tokens and of panels, in tiles of all sizes."""

    def products() -> list[Tensor]:
        found = []
        for panels in (1, 2, 3, 4, 5, 7, 11):
            linear = make(storage, 16 * panels - 3, inputs)
            alone = torch.cat([linear(row) for row in random(21, inputs, seed=2).split(1)])
            for rows in (*range(1, 14), 21):
                found.append(linear(random(21, inputs, seed=2)[:rows]))
                assert torch.equal(found[-1], alone[:rows])
        return found

    assert all(map(torch.equal, *with_both(products)))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_network(
    with_both: WithBoth[Tensor],
    tiny_checkpoint: Callable[..., Path],
    quantize: str | None,
) -> None:
    folder = str(tiny_checkpoint())
    tokens = torch.randint(0, 96, (90,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits() -> Tensor:
        return layerskip.load(folder, kernels="native", quantize=quantize).logits(tokens)  # type: ignore[arg-type]

    assert torch.equal(*with_both(logits))


def test_noise(with_both: WithBoth[Tensor]) -> None:
    keys = [[make_key(5, Purpose.TARGET, position) for position in range(4)]]
    assert torch.equal(*with_both(lambda: sampling.gumbel(keys, 1003)))
