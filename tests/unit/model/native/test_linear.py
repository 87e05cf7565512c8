"""Products with weights in panels, against torch's."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from layerskip.model.native.library import COMPUTE, GROUP, load_library
from layerskip.model.native.linear import NativeLinear, interleave

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, storage: str) -> Tensor:
    """What a weight is after it was stored."""
    match storage:
        case "bfloat16":
            return weight.bfloat16().float()
        case "int8":
            step = weight.abs().amax(1, keepdim=True) / 127
            return (weight / step).round().clamp(-128, 127) * step
        case "int4":
            groups = weight.view(len(weight), -1, GROUP)
            step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
            return ((groups / step).round().clamp(-8, 7) * step).view_as(weight)
        case _:
            return weight


@needs_library
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (70, 64), (333, 160)])
def test_products(storage: str, outputs: int, inputs: int, threads: int) -> None:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    linear = NativeLinear(weight, bias=bias, storage=storage)
    plain = NativeLinear(weight, storage=storage)
    for rows in (1, 2, 3, 4, 5, 6, 7, 9, 13):
        x = random(rows, inputs, seed=rows)
        wanted = x @ rounded(weight, storage).t()
        torch.testing.assert_close(linear(x), wanted + bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(storage: str) -> None:
    linear = NativeLinear(random(208, 96), storage=storage)
    x = random(17, 96, seed=1)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for rows in (2, 3, 5, 6, 7, 17):
        assert torch.equal(linear(x[:rows]), alone[:rows])


def in_8_bits(x: Tensor) -> Tensor:
    """Inputs as products with `compute` int8 see them."""
    groups = x.view(len(x), -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step).round().nan_to_num() * step).view_as(x)


def in_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Products in bfloat16, one sum after the other: the second input of each pair, then the first."""
    x, weight = x.bfloat16().double(), weight.bfloat16().double()
    sums = torch.zeros(len(x), len(weight))
    for i in range(0, x.shape[1], 2):
        for place in (i + 1, i):  # products are exact in float64, and so are nearly all of the sums
            sums = (sums.double() + x[:, place, None] * weight[:, place]).float()
    return sums


@needs_library
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (70, 66), (333, 160), (48, 6)])
def test_products_in_bfloat16(outputs: int, inputs: int, threads: int) -> None:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    linear = NativeLinear(weight, bias=bias, storage="bfloat16", compute="bfloat16")
    plain = NativeLinear(weight, storage="bfloat16", compute="bfloat16")
    assert plain.view.compute == COMPUTE["bfloat16"]
    x = random(70, inputs, seed=2)
    x[3] = 0
    x[4] *= 1e-20
    x[5] = x[5].bfloat16().float() * (1 + 2**-8)  # halfway between two numbers
    wanted = in_pairs(x, weight)
    alone = torch.cat([linear(row) for row in x.split(1)])
    assert torch.equal(torch.cat([plain(row) for row in x.split(1)]), wanted)
    torch.testing.assert_close(alone, wanted + bias, rtol=1e-5, atol=1e-5)
    for rows in range(1, 71):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_inputs_that_are_not_finite_are_not_lost_in_bfloat16(bad: float) -> None:
    linear = NativeLinear(random(48, 64), storage="bfloat16", compute="bfloat16")
    for place in (40, 63):
        x = random(2, 64, seed=1)
        x[1, place] = bad
        out = linear(x)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()


@needs_library
def test_inputs_too_small_for_normal_numbers_are_zeros_in_bfloat16() -> None:
    linear, x = NativeLinear(torch.full((16, 32), 2.0), compute="bfloat16"), torch.full((2, 32), 1e-39)
    assert linear.storage == "bfloat16"
    assert torch.equal(linear(x), torch.zeros(2, 16))


@needs_library
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (70, 64), (333, 160)])
def test_products_with_inputs_in_8_bits(storage: str, outputs: int, inputs: int, threads: int) -> None:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    linear = NativeLinear(weight, bias=bias, storage=storage, compute="int8")
    x = random(70, inputs, seed=2)
    x[3, :GROUP] = 0
    x[4] *= 1e-20
    wanted = in_8_bits(x) @ rounded(weight, storage).t() + bias
    alone = torch.cat([linear(row) for row in x.split(1)])
    torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-4)
    for rows in range(1, 71):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_not_lost_in_8_bits(bad: float) -> None:
    linear = NativeLinear(random(48, 64), storage="int8", compute="int8")
    for rows in (2, 9):
        x = random(rows, 64, seed=1)
        x[1, 40] = bad
        out = linear(x)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()


@needs_library
@pytest.mark.parametrize(
    ("compute", "storage", "inputs"),
    [
        ("int8", "float32", 64),
        ("int8", "bfloat16", 64),
        ("int8", "int8", 40),
        ("bfloat16", "float32", 64),
        ("bfloat16", "int4", 64),
        ("bfloat16", "bfloat16", 63),
    ],
)
def test_other_products_stay_in_float32(compute: str, storage: str, inputs: int) -> None:
    weight, x = random(32, inputs), random(3, inputs, seed=1)
    ours, plain = (NativeLinear(weight, storage=storage, compute=compute) for compute in (compute, "float32"))
    assert torch.equal(ours(x), plain(x))


@needs_library
def test_int8_with_any_number_of_inputs(threads: int) -> None:
    for inputs in (1, 2, 3, 5, 31, 33, 66):
        weight, x = random(20, inputs), random(4, inputs, seed=1)
        linear = NativeLinear(weight, storage="int8")
        torch.testing.assert_close(linear(x), x @ rounded(weight, "int8").t(), rtol=1e-4, atol=1e-4)


@needs_library
def test_bfloat16_is_taken_where_it_loses_nothing() -> None:
    weight = random(32, 64)
    exact = NativeLinear(weight.bfloat16().float())
    assert exact.storage == "bfloat16"
    assert NativeLinear(weight).storage == "float32"
    assert exact.num_bytes == NativeLinear(weight).num_bytes / 2
    x = random(3, 64, seed=1)
    assert torch.equal(exact(x), NativeLinear(weight.bfloat16().float(), storage="float32")(x))


@needs_library
def test_bytes_of_quantized_weights() -> None:
    weight = random(256, 512)
    floats = NativeLinear(weight).num_bytes
    assert NativeLinear(weight, storage="int8").num_bytes < 0.26 * floats
    assert NativeLinear(weight, storage="int4").num_bytes < 0.15 * floats


def test_interleaving_fills_up_panels() -> None:
    bias = torch.arange(1, 41)
    mixed = interleave(bias)
    assert mixed.tolist() == [*range(1, 17), *range(21, 37), *range(17, 21), *[0] * 12, *range(37, 41), *[0] * 12]
    if load_library() is not None:
        weight, x = random(40, 32), random(3, 32, seed=1)
        product, rows = NativeLinear(*weight.chunk(2), bias=mixed), x @ weight.t() + bias
        out = torch.stack([product(row) for row in x.split(1)]).view(3, -1)
        assert out.shape == (3, 40)
        torch.testing.assert_close(out[:, :16], rows[:, :16])
        torch.testing.assert_close(out[:, 16:32], rows[:, 20:36])
        torch.testing.assert_close(out[:, 32:36], rows[:, 16:20])


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads: int) -> None:
    linear, x = NativeLinear(random(64, 64)), random(2, 64)
    wanted = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(x), wanted)
