"""Every kernel and layout multiplies like torch's own product.

Shapes: I input width, O output width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.torch.linear import WIDE, DenseLinear, OneDNNLinear, has_onednn, make_linear, pack, packs

CPU = torch.device("cpu")
ROWS = [*range(1, 10), 64]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (40, 51), (WIDE, 33)])
def test_equals_stock(dtype: torch.dtype, bias: bool, packed: bool, inner: int, outer: int) -> None:
    if not has_onednn(CPU, dtype):
        pytest.skip(f"oneDNN multiplies no {dtype} here")
    weight = random(outer, inner).to(dtype)
    added = random(outer).to(dtype) if bias else None
    linear = OneDNNLinear(pack(weight) if packed else weight, added)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for rows in ROWS:
        x = random(rows, inner).to(dtype)
        wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
        out = linear(x)
        assert out.dtype == dtype
        assert out.shape == (rows, outer)
        assert float((out.double() - wanted).abs().max() / wanted.abs().max()) < tolerance
        assert torch.equal(linear(x.view(1, rows, inner))[0], out)  # any leading dimensions
        assert torch.equal(linear(x.view(rows, 1, inner))[:, 0], out)


@pytest.mark.parametrize(("inner", "packed"), [(16, True), (WIDE - 1, True), (WIDE, False)])
def test_narrow_weights_are_packed_and_wide_ones_kept(inner: int, packed: bool) -> None:
    if not has_onednn(CPU, torch.float32):
        pytest.skip("oneDNN multiplies nothing here")
    assert packs(CPU, torch.float32, inner) == packed
    weight, x = random(8, inner), random(2, inner)
    linear = make_linear(weight)
    assert isinstance(linear, OneDNNLinear)
    assert (linear.weight is weight) != packed
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before) == packed


def test_strided_weights() -> None:
    for inner in (16, WIDE):
        weight, x = random(inner, 8).t(), random(3, inner)
        torch.testing.assert_close(make_linear(weight)(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_stay_plain(dtype: torch.dtype) -> None:
    assert not has_onednn(CPU, dtype)
    weight, added, x = random(8, 16).to(dtype), random(8).to(dtype), random(3, 16).to(dtype)
    linear = make_linear(weight, added)
    assert isinstance(linear, DenseLinear)
    assert linear.weight is weight
    assert torch.equal(linear(x), F.linear(x, weight, added))


def test_other_devices_stay_plain() -> None:
    assert not has_onednn(torch.device("meta"), torch.float32)
    assert isinstance(make_linear(torch.empty(4, 4, device="meta")), DenseLinear)
