"""Training on CUDA: exit losses in bfloat16 and by Liger's kernel, dropped layers. Skipped where there is no GPU."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import layerskip
from layerskip import (
    CheckpointConfig,
    DataConfig,
    LayerSkipConfig,
    LayerSkipRecipe,
    OptimizationConfig,
    StartConfig,
    TrainingConfig,
    train,
)
from layerskip.training.recipe import recipe as recipe_module

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
def test_loss_and_gradients_are_those_of_the_cpu(exit_loss: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "liger_cross_entropy", lambda head, device: None)
    config = LayerSkipConfig(dropout_max=0.5, exit_loss=exit_loss, rotation=2)  # type: ignore[arg-type]
    on_cpu = tiny_model()
    here = copy.deepcopy(on_cpu).to(device)
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradient(on_cpu, tokens, config)
    assert loss_and_gradient(here, tokens.to(device), config) == pytest.approx(expected, rel=1e-4)


def test_ligers_kernel_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need CUDA")
    config = LayerSkipConfig(dropout_max=0.0, rotation=2)
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1)).cuda()
    model = tiny_model().cuda()
    fused = loss_and_gradient(copy.deepcopy(model), tokens, config)
    monkeypatch.setattr(recipe_module, "liger_cross_entropy", lambda head, device: None)
    assert loss_and_gradient(model, tokens, config) == pytest.approx(fused, rel=1e-3)


@pytest.mark.parametrize("exit_loss", ["ce", "kl"])
def test_training_in_bfloat16_with_autocast(device: str, exit_loss: str) -> None:
    model = tiny_model().to(device)
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1)).to(device)
    config = LayerSkipConfig(dropout_max=0.3, exit_loss=exit_loss, rotation=2)  # type: ignore[arg-type]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, norm = loss_and_gradient(model, tokens, config)
    assert 5 < loss < 8
    assert norm > 0


def test_gradient_checkpointing_drops_the_same_samples(device: str) -> None:
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(1)).to(device)
    config = LayerSkipConfig(dropout_max=0.5, rotation=2)
    model = tiny_model().to(device)
    expected = loss_and_gradient(copy.deepcopy(model), tokens, config)
    model.gradient_checkpointing_enable()
    assert loss_and_gradient(model, tokens, config) == pytest.approx(expected, rel=1e-4)


def test_a_run_from_start_to_checkpoint(training_start: Any, tmp_path: Path, device: str) -> None:
    """In bfloat16; what it leaves loads on the device and writes the same text with and without drafts."""
    pytest.importorskip("accelerate")
    config, texts = training_start()
    settings = TrainingConfig(
        start=StartConfig(config=str(config), vocab_size=300),
        data=DataConfig(data=(str(texts),), sequence_length=32, held_out=0.1),
        recipe=LayerSkipConfig(dropout_max=0.2, rotation=2),
        optimization=OptimizationConfig(max_steps=12, batch_size=4, learning_rate=1e-2, precision="bfloat16"),
        checkpoints=CheckpointConfig(log_steps=1, save_steps=6),
    )
    result = train(settings, tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(losses) == result.step == 12
    assert losses[-1] < losses[0] - 0.3
    lm = layerskip.load(str(tmp_path / "run"), device=device)
    options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
    expected = lm.generate([[5, 6, 7]], generation_strategy="autoregressive", **options)
    found = lm.generate([[5, 6, 7]], exit_layer=2, num_speculations=3, **options)
    assert [x.token_ids for x in found] == [x.token_ids for x in expected]
