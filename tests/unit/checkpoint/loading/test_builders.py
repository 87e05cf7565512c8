"""What each kind of network makes of a weight."""

import pytest
import torch
import torch.nn.functional as F

from layerskip.checkpoint.loading.builders import NativeBuilder, TorchBuilder
from layerskip.checkpoint.loading.plan import LoadingPlan
from layerskip.model.blocks import BlockWeight
from layerskip.model.native.library import load_library
from layerskip.model.native.linear import NativeLinear
from layerskip.model.torch.linear import DenseLinear

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


def plan(**options: object) -> LoadingPlan:
    return LoadingPlan(device=CPU, dtype=torch.float32, context=8, **options)  # type: ignore[arg-type]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_weights_for_torch_compile_stay_as_torch_has_them() -> None:
    builder, weight = TorchBuilder.of(plan(rounds="max")), random(48, 32)
    linear = builder.linear("o", weight)
    assert isinstance(linear, DenseLinear)
    assert linear.weight is weight
    assert not builder.copies(32)
    assert builder.for_drafts("int8").copies(32)


@needs_library
@pytest.mark.parametrize("inner", [48, 40])
def test_gate_and_up_alternate_and_down_takes_what_they_give(inner: int) -> None:
    """16 outputs of each in turn; a width that isn't a multiple of 16 is filled up with zeros."""
    builder, weight, bias, down = NativeBuilder.of(plan()), random(2 * inner, 32), random(2 * inner), random(32, inner)
    x, padded = random(3, 32), -(-inner // 16) * 16
    both = builder.linear("gate_up", weight, bias)
    panels = torch.stack([both(row) for row in x.split(1)]).view(3, -1)
    full = F.pad(panels, (0, 2 * padded - panels.shape[1])).view(3, -1, 2, 16)
    gate, up = (full[:, :, half].flatten(1)[:, :inner] for half in (0, 1))
    wanted = x @ weight.t() + bias
    shown = slice(0, inner // 16 * 16)  # the last panel is only returned as far as the outputs are
    torch.testing.assert_close(gate[:, shown], wanted[:, :inner][:, shown])
    torch.testing.assert_close(up[:, shown], wanted[:, inner:][:, shown])
    hidden = random(2, inner)
    product = builder.linear("down", down)(F.pad(hidden, (0, padded - inner)))
    torch.testing.assert_close(product, hidden @ down.t(), rtol=1e-4, atol=1e-4)


@needs_library
def test_gate_and_up_in_blocks_may_be_one_tensor_or_two() -> None:
    data = torch.randint(0, 256, (64, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data[:, [0, 1, 18, 19]] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8).repeat(2)
    whole, x = BlockWeight("q4_0", data), random(2, 64)
    builder = NativeBuilder.of(plan())
    halves = [BlockWeight("q4_0", half) for half in data.chunk(2)]
    one, two = builder.linear("gate_up", [whole]), builder.linear("gate_up", halves)
    assert one.storage == "q4_0"
    assert torch.equal(one(x), two(x))


@needs_library
def test_blocks_are_kept_unless_other_bits_are_asked_for() -> None:
    builder = NativeBuilder.of(plan())
    assert builder.keeps_blocks
    few = builder.for_drafts("int4")
    assert not few.keeps_blocks
    assert few.memory is builder.memory
    weight = random(32, 64)
    assert isinstance(few.linear("o", weight), NativeLinear)
    assert [few.linear("o", weight).storage, few.linear("o", random(32, 48)).storage] == ["int4", "int8"]
