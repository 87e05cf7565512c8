"""Losses of exits against naive formulas, and the joint loss against plain autograd on whole logits."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip.training.recipe.exit_loss import (
    EXIT_LOSSES,
    IGNORED,
    LK_DECAY,
    Head,
    JointLoss,
    ce_loss,
    kl_loss,
    lk_loss,
)

V, D, N = 23, 8, 29
WEIGHTS = {0: 0.1, 2: 0.2, 3: 0.7}


def random_logits(seed: int, rows: int = 7, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def some_labels(rows: int = 7, ignored: tuple[int, ...] = ()) -> Tensor:
    labels = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(9))
    labels[list(ignored)] = IGNORED
    return labels


# --- loss of a token -------------------------------------------------------------------------------------------------


def test_cross_entropy_is_minus_the_log_of_the_labels_probability() -> None:
    logits, labels = random_logits(0), some_labels(ignored=(2,))
    expected = [0.0 if y == IGNORED else -torch.softmax(x, -1)[y].log().item() for x, y in zip(logits, labels)]  # noqa: B905
    assert ce_loss(logits, random_logits(1), labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_is_the_last_layers_divergence_from_the_exit() -> None:
    logits, teacher = random_logits(0), random_logits(1)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_loss(logits, teacher, some_labels()), expected)
    reverse = (q * (q / p).log()).sum(-1)
    assert (expected - reverse).abs().min() > 1e-3  # the two directions differ on these logits


def test_lk_blends_kl_and_total_variation_by_acceptance() -> None:
    logits, teacher = random_logits(0), random_logits(1)
    teacher[:3] = logits[:3] + 0.1 * teacher[:3]  # high acceptance in some rows, low in others
    p, q = teacher.softmax(-1), logits.softmax(-1)
    acceptance = torch.minimum(p, q).sum(-1)
    assert acceptance.max() > 0.9
    assert acceptance.min() < 0.5
    blend = (-LK_DECAY * acceptance).exp()
    expected = blend * (p * (p / q).log()).sum(-1) + (1 - blend) * (1 - acceptance)
    torch.testing.assert_close(lk_loss(logits, teacher, some_labels()), expected)


@pytest.mark.parametrize("loss", [kl_loss, lk_loss])
def test_distillation_from_equal_logits_costs_nothing(loss: Callable[..., Tensor]) -> None:
    logits = random_logits(0)
    shifted = logits + 3.0  # the same distribution
    assert loss(logits, shifted, some_labels()).abs().max() < 1e-12
    assert (loss(logits, random_logits(1), some_labels()) > 1e-2).all()


@pytest.mark.parametrize("name", ["ce", "kl", "lk"])
def test_ignored_tokens_have_neither_loss_nor_gradient(name: Any) -> None:
    logits = random_logits(0).requires_grad_()
    losses = EXIT_LOSSES[name](logits, random_logits(1), some_labels(ignored=(0, 4)))
    losses.sum().backward()
    for row in range(7):
        assert (losses[row] == 0) == (row in (0, 4))
        assert (logits.grad[row] == 0).all() == (row in (0, 4))


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_a_gradient_step_on_lk_raises_acceptance(scale: float) -> None:
    """Also where nearly all drafts are accepted already, or nearly none."""

    def acceptance(logits: Tensor) -> Tensor:
        return torch.minimum(logits.softmax(-1), teacher.softmax(-1)).sum(-1)

    teacher = random_logits(1, scale=scale)
    logits = random_logits(0, scale=scale).requires_grad_()
    lk_loss(logits, teacher, some_labels()).sum().backward()
    step = 1e-3 * logits.grad / logits.grad.norm(dim=-1, keepdim=True)
    assert (acceptance(logits - step) > acceptance(logits)).all()


def test_the_blend_of_lk_has_no_gradient() -> None:
    teacher = random_logits(1)
    logits = random_logits(0).requires_grad_()
    p, q = teacher.softmax(-1), logits.softmax(-1)
    variation = 0.5 * (p - q).abs().sum(-1)
    blend = (-LK_DECAY * (1 - variation)).exp()
    divergence = (p * (p / q).log()).sum(-1)

    def gradient(blend: Tensor) -> Tensor:
        return torch.autograd.grad((blend * divergence + (1 - blend) * variation).sum(), logits, retain_graph=True)[0]

    found = torch.autograd.grad(lk_loss(logits, teacher, some_labels()).sum(), logits)[0]
    torch.testing.assert_close(found, gradient(blend.detach()))
    assert (gradient(blend) - gradient(blend.detach())).abs().max() > 1e-3


# --- joint loss of a batch -------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Embedding, four layers, norm and head: hidden states of every layer, whose gradients reach all parameters."""

    def __init__(self, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=bias)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = 0.5 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
        if tied:
            self.head.weight = self.embedding.weight

    def states(self, exits: Any = WEIGHTS) -> dict[int, Tensor]:
        hidden = self.embedding(torch.arange(N) % V)
        found = {}
        for i, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden).tanh()
            if i in exits:
                found[i] = hidden
        for state in found.values():
            state.retain_grad() if state.requires_grad else None
        return found

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def run_joint(trunk: Trunk, labels: Tensor, name: Any = "ce", **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
    settings: dict[str, Any] = {"chunk_tokens": 10, "stop_gradient": False, **options}
    states = trunk.states()
    joint = JointLoss(head=Head(norm=trunk.norm, linear=trunk.head), exit_loss=EXIT_LOSSES[name], **settings)
    loss = joint(states, WEIGHTS, labels, 17.0)
    (3.0 * loss).backward()  # not 1: the backward pass has to scale
    return loss, states


def run_plain(
    trunk: Trunk, labels: Tensor, name: Any = "ce", *, stop: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """The same from whole logits."""
    states = trunk.states()
    teacher = trunk.head(trunk.norm(states[3])).float()
    loss = WEIGHTS[3] * F.cross_entropy(teacher, labels, ignore_index=IGNORED, reduction="sum")
    for exit_ in (0, 2):
        tail = nn.Sequential(trunk.norm, trunk.head)
        fixed = {n: p.detach() for n, p in tail.named_parameters()} if stop else {}
        logits = functional_call(tail, fixed, states[exit_]).float()
        loss = loss + WEIGHTS[exit_] * EXIT_LOSSES[name](logits, teacher.detach(), labels).sum()
    loss = loss / 17.0
    (3.0 * loss).backward()
    return loss, states


def assert_same(a: Trunk, b: Trunk, found: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for exit_ in WEIGHTS:
        torch.testing.assert_close(found[1][exit_].grad, expected[1][exit_].grad, **tolerance)
    for (name, ours), theirs in zip(a.gradients().items(), b.gradients().values(), strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 10, N, 1000])
@pytest.mark.parametrize("name", ["ce", "kl", "lk"])
def test_value_and_gradients_equal_those_of_whole_logits(name: str, chunk_tokens: int) -> None:
    trunk, plain = Trunk(), Trunk()
    labels = some_labels(N, ignored=(0, 5, 6, 28))
    found = run_joint(trunk, labels, name, chunk_tokens=chunk_tokens)
    assert_same(trunk, plain, found, run_plain(plain, labels, name), rtol=1e-5, atol=1e-5)
    assert trunk.head.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("stop", [False, True], ids=["joint", "stopped"])
def test_a_fused_kernel_gets_normed_states_of_all_tokens_and_gives_the_same(stop: bool) -> None:
    trunk, plain = Trunk(), Trunk()
    labels = some_labels(N, ignored=(3,))
    seen: list[int] = []

    def fused(hidden: Tensor, wanted: Tensor) -> Tensor:
        seen.append(len(hidden))
        return F.cross_entropy(trunk.head(hidden), wanted, ignore_index=IGNORED, reduction="sum")

    found = run_joint(trunk, labels, "ce", stop_gradient=stop, fused=fused)
    assert_same(trunk, plain, found, run_plain(plain, labels, "ce", stop=stop), rtol=1e-5, atol=1e-5)
    assert seen == [N] * len(WEIGHTS)


def test_a_fused_kernel_is_left_out_where_logits_are_needed() -> None:
    def fused(hidden: Tensor, wanted: Tensor) -> Tensor:
        raise AssertionError("kl needs logits")

    trunk, plain = Trunk(), Trunk()
    found = run_joint(trunk, some_labels(N), "kl", fused=fused)
    assert_same(trunk, plain, found, run_plain(plain, some_labels(N), "kl"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", [False, True], ids=["joint", "stopped"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_and_biased_heads(tied: bool, bias: bool, stop: bool) -> None:
    trunk, plain = Trunk(tied=tied, bias=bias), Trunk(tied=tied, bias=bias)
    labels = some_labels(N, ignored=(3,))
    found = run_joint(trunk, labels, "kl", stop_gradient=stop)
    assert_same(trunk, plain, found, run_plain(plain, labels, "kl", stop=stop), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ce", "kl", "lk"])
def test_stopped_gradients_train_the_head_with_the_last_loss_alone(name: str) -> None:
    trunk, labels = Trunk(), some_labels(N)
    _, states = run_joint(trunk, labels, name, stop_gradient=True)
    last = Trunk()
    logits = last.head(last.norm(last.states()[3]))
    (3.0 / 17.0 * WEIGHTS[3] * F.cross_entropy(logits, labels, reduction="sum")).backward()
    torch.testing.assert_close(trunk.head.weight.grad, last.head.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trunk.norm.weight.grad, last.norm.weight.grad, rtol=1e-5, atol=1e-5)
    _, joint = run_joint(Trunk(), labels, name)
    for exit_ in (0, 2):  # exits still train the layers below them, as much as without the stop
        torch.testing.assert_close(states[exit_].grad, joint[exit_].grad)
        assert states[exit_].grad.abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [("head",), ("norm",), ("norm", "head")])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen: tuple[str, ...]) -> None:
    trunk, plain, labels = Trunk(), Trunk(), some_labels(N)
    for model in (trunk, plain):
        for name in frozen:
            getattr(model, name).requires_grad_(False)
    assert_same(trunk, plain, run_joint(trunk, labels), run_plain(plain, labels), rtol=1e-5, atol=1e-5)
    assert all(getattr(trunk, name).weight.grad is None for name in frozen)


def test_states_without_gradient_leave_the_others_alone() -> None:
    """Adapters in later layers only: the first exit's state depends on nothing that is trained."""
    trunk, plain, labels = Trunk(), Trunk(), some_labels(N)
    for model in (trunk, plain):
        model.embedding.requires_grad_(False)
        model.layers[:2].requires_grad_(False)
    assert_same(trunk, plain, run_joint(trunk, labels), run_plain(plain, labels), rtol=1e-5, atol=1e-5)
    assert trunk.layers[2].weight.grad is not None


def test_bfloat16_parameters_add_up_chunks_in_float32() -> None:
    trunk, plain = Trunk().bfloat16(), Trunk().bfloat16()
    labels = some_labels(N)
    loss, _ = run_joint(trunk, labels, chunk_tokens=1)
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in trunk.parameters()} == {torch.bfloat16}
    exact = Trunk().bfloat16().float()
    expected, _ = run_plain(exact, labels)
    run_plain(plain, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)

    def error(model: Trunk) -> float:
        want = exact.head.weight.grad
        return ((model.head.weight.grad.float() - want).norm() / want.norm()).item()

    assert error(trunk) < 0.02
    assert error(trunk) < 2 * error(plain) + 1e-3  # a piece at a time isn't worse than all at once


def test_scale_and_softcap_of_the_head() -> None:
    trunk = Trunk(bias=True)
    plain, head = Head(norm=trunk.norm, linear=trunk.head), trunk.states()[3]
    raw = trunk.head(trunk.norm(head))
    torch.testing.assert_close(plain(head), raw)
    torch.testing.assert_close(replace(plain, scale=0.5)(head), raw * 0.5)
    torch.testing.assert_close(replace(plain, softcap=2.0, scale=0.5)(head), 2 * torch.tanh(raw * 0.5 / 2))


def test_tokens_without_labels_give_zero_gradients() -> None:
    trunk = Trunk()
    loss, states = run_joint(trunk, torch.full((N,), IGNORED))
    assert loss.item() == 0
    assert all((state.grad == 0).all() for state in states.values())
    assert (trunk.head.weight.grad == 0).all()


class LiveLogits(TorchDispatchMode):
    """Counts the rows of all tensors [n, V] that are alive, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Any]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == V:
                self.alive.append(weakref.ref(tensor.untyped_storage()))
        storages = {id(s): s.nbytes() for ref in self.alive if (s := ref()) is not None}
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.peak = max(self.peak, sum(storages.values()) // (4 * V))
        return output


@pytest.mark.parametrize("name", ["ce", "kl", "lk"])
def test_logits_of_all_exits_never_exist_at_once(name: Any) -> None:
    def peak(exits: int, tokens: int, chunk_tokens: int) -> int:
        generator = torch.Generator().manual_seed(0)
        states = {i: torch.randn(tokens, D, generator=generator).requires_grad_() for i in range(exits)}
        labels = torch.randint(0, V, (tokens,), generator=generator)
        trunk = Trunk()
        joint = JointLoss(
            head=Head(norm=trunk.norm, linear=trunk.head),
            exit_loss=EXIT_LOSSES[name],
            stop_gradient=False,
            chunk_tokens=chunk_tokens,
        )
        with LiveLogits() as live:
            joint(states, dict.fromkeys(states, 1 / exits), labels, tokens).backward()
        return live.peak

    few = peak(2, 40, 10)
    assert few >= 20  # teacher and exit are seen
    assert peak(12, 40, 10) == few  # not more for more exits
    assert peak(2, 400, 10) == few  # nor for more tokens
    assert peak(2, 400, 100) > 5 * few  # but for larger chunks


def test_the_head_never_sees_more_than_a_chunk() -> None:
    trunk, rows = Trunk(), []
    trunk.norm.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    run_joint(trunk, some_labels(N), chunk_tokens=10)
    assert rows == [10] * 6 + [9] * 3
