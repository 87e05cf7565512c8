"""Training on CUDA: exit losses in bfloat16 and by Liger's kernel, dropped layers. Skipped where there is no GPU."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip import LayerSkipConfig, LayerSkipRecipe
from layerskip.training import recipe as recipe_module

pytestmark = pytest.mark.gpu


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).train()


def loss_and_gradient(model: LlamaForCausalLM, tokens: torch.Tensor, config: LayerSkipConfig) -> tuple[float, float]:
    recipe = LayerSkipRecipe(model, config)
    recipe.begin_step(1, 10)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    recipe.detach()
    norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    return float(loss), norm**0.5


@pytest.mark.parametrize("exit_loss", ["ce", "kl", "lk"])
def test_loss_and_gradients_are_those_of_the_cpu(exit_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(recipe_module, "liger_cross_entropy", lambda head, device: None)
    config = LayerSkipConfig(dropout_max=0.5, exit_loss=exit_loss, rotation=2)  # type: ignore[arg-type]
    on_cpu = tiny_model()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradient(on_cpu, tokens, config)
    assert loss_and_gradient(on_gpu, tokens.cuda(), config) == pytest.approx(expected, rel=1e-4)


def test_ligers_kernel_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    config = LayerSkipConfig(dropout_max=0.0, rotation=2)
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1)).cuda()
    model = tiny_model().cuda()
    fused = loss_and_gradient(copy.deepcopy(model), tokens, config)
    monkeypatch.setattr(recipe_module, "liger_cross_entropy", lambda head, device: None)
    assert loss_and_gradient(model, tokens, config) == pytest.approx(fused, rel=1e-3)


def test_training_in_bfloat16_with_autocast() -> None:
    model = tiny_model().cuda()
    tokens = torch.randint(0, 512, (6, 32)).cuda()
    config = LayerSkipConfig(dropout_max=0.3, exit_loss="kl", rotation=2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, norm = loss_and_gradient(model, tokens, config)
    assert 5 < loss < 8
    assert norm > 0
