"""Packed weights multiply like plain ones.

Shapes: I input width, O output width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.linear import DenseLinear, PackedLinear, can_pack, make_linear

CPU = torch.device("cpu")
ROWS = [*range(1, 10), 64]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (40, 51)])
def test_packed_equals_plain(dtype: torch.dtype, bias: bool, inner: int, outer: int) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN packs no {dtype} here")
    weight = random(outer, inner).to(dtype)
    added = random(outer).to(dtype) if bias else None
    packed = PackedLinear(weight, added)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for rows in ROWS:
        x = random(rows, inner).to(dtype)
        wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
        out = packed(x)
        assert out.dtype == dtype
        assert out.shape == (rows, outer)
        assert float((out.double() - wanted).abs().max() / wanted.abs().max()) < tolerance
        assert torch.equal(packed(x.view(1, rows, inner))[0], out)  # any leading dimensions
        assert torch.equal(packed(x.view(rows, 1, inner))[:, 0], out)


def test_packed_weights_are_a_copy() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("oneDNN packs nothing here")
    weight, x = random(8, 16), random(2, 16)
    packed = PackedLinear(weight)
    before = packed(x)
    weight.zero_()
    assert torch.equal(packed(x), before)


def test_strided_weights() -> None:
    weight, x = random(16, 8).t(), random(3, 16)
    torch.testing.assert_close(make_linear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_stay_plain(dtype: torch.dtype) -> None:
    assert not can_pack(CPU, dtype)
    weight, added, x = random(8, 16).to(dtype), random(8).to(dtype), random(3, 16).to(dtype)
    linear = make_linear(weight, added)
    assert isinstance(linear, DenseLinear)
    assert linear.weight is weight
    assert torch.equal(linear(x), F.linear(x, weight, added))


def test_other_devices_stay_plain() -> None:
    assert not can_pack(torch.device("meta"), torch.float32)
    assert isinstance(make_linear(torch.empty(4, 4, device="meta")), DenseLinear)
