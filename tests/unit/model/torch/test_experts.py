"""A mixture of experts, held against a loop over tokens.

Shapes: N tokens, E experts, D width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.torch.experts import Expert, Experts, run_experts
from layerskip.model.torch.linear import DenseLinear, Linear

WIDTH, INNER = 6, 4


class Counting(DenseLinear):
    """A product that counts the rows it is given."""

    rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        assert len(x), "an expert without tokens was run"
        return super().__call__(x)


def make(num_experts: int, per_token: int, dtype: torch.dtype = torch.float32) -> Experts[Linear]:
    generator = torch.Generator().manual_seed(num_experts)

    def linear(outputs: int, inputs: int) -> Counting:
        return Counting(torch.randn(outputs, inputs, generator=generator).to(dtype))

    return Experts(
        router=linear(num_experts, WIDTH),
        experts=tuple(Expert(gate_up=linear(2 * INNER, WIDTH), down=linear(WIDTH, INNER)) for _ in range(num_experts)),
        per_token=per_token,
    )


def run(gate_up: Linear, down: Linear, x: Tensor) -> Tensor:
    gate, up = gate_up(x).chunk(2, -1)
    return down(F.silu(gate) * up)


def one_by_one(experts: Experts[Linear], x: Tensor, *, norm_weights: bool) -> Tensor:
    rows = []
    for token in x.reshape(-1, 1, WIDTH):
        probabilities = experts.router(token).float().softmax(-1)[0]
        best = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert])[: experts.per_token]
        total = sum(probabilities[expert] for expert in best) if norm_weights else 1.0
        parts = [experts.experts[expert] for expert in best]
        outputs = [run(part.gate_up, part.down, token)[0].float() for part in parts]
        rows.append(sum(probabilities[expert] / total * out for expert, out in zip(best, outputs, strict=True)))
    return torch.stack(rows).view(x.shape).to(x.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm_weights", [True, False])
@pytest.mark.parametrize(("num_experts", "per_token"), [(4, 2), (1, 1), (5, 1), (3, 3), (40, 8)])
def test_the_mixture_of_each_token(num_experts: int, per_token: int, norm_weights: bool) -> None:
    experts = make(num_experts, per_token)
    for shape in ((1, 1), (2, 7), (1, 33)):
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(2))
        found = run_experts(experts, x, run, norm_weights=norm_weights)
        torch.testing.assert_close(found, one_by_one(experts, x, norm_weights=norm_weights))


def test_weights_sum_to_1_only_where_they_are_asked_to() -> None:
    experts, x = make(4, 2), torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    normed, plain = (run_experts(experts, x, run, norm_weights=norm) for norm in (True, False))
    assert (normed.norm(dim=-1) > plain.norm(dim=-1) * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers(dtype: torch.dtype) -> None:
    experts = make(4, 2, dtype)
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = run_experts(experts, x, run, norm_weights=True)
    assert found.dtype == dtype
    wanted = one_by_one(experts, x, norm_weights=True)
    assert (found - wanted).float().norm() < 2e-2 * wanted.float().norm()


def test_an_expert_runs_once_over_its_tokens_and_not_without_any() -> None:
    experts = make(40, 2)
    run_experts(experts, torch.ones(2, 3, WIDTH), run, norm_weights=True)  # six tokens alike
    rows = sorted(expert.gate_up.rows for expert in experts.experts)  # type: ignore[attr-defined]
    assert rows == [0] * 38 + [6, 6]


def test_bytes_are_those_that_one_token_reads() -> None:
    experts = make(4, 2)
    of_expert = experts.experts[0].gate_up.num_bytes + experts.experts[0].down.num_bytes
    assert experts.num_bytes == experts.router.num_bytes + 2 * of_expert
