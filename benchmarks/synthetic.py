"""Checkpoints with random weights in the shapes of real models, whose exits agree with the last layer at a chosen rate.

Speed depends on shapes and on how many drafts are accepted, not on what the weights have learned. The head is a
shuffled copy of the embedding, so that a model doesn't repeat itself; the layers from the exit on are scaled down
until the exit agrees as often as it should.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from tiny import contributing_layer

EMBEDDING_SCALE = 6.0
CALIBRATION_TOKENS = 384
CALIBRATION_STEPS = 7

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "240m": {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
             "num_attention_heads": 16, "num_key_value_heads": 16},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0},
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0},
}  # fmt: skip
"""Llamas by name; `1b` and `8b` are Llama 3's."""


def make_synthetic(
    folder: Path,
    shape: str,
    *,
    exit_layer: int,
    agreement: float,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> float:
    """Write a checkpoint.

    Args:
        folder: Where to.
        shape: A key of `SHAPES`.
        exit_layer: E, the exit whose agreement is set.
        agreement: Share of random tokens after which the exit's likeliest token should be the last layer's.
        dtype: Of the file.
        device: Where it is calibrated.

    Returns:
        The agreement reached.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = _llama_config(shape)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.mul_(EMBEDDING_SCALE)
        model.lm_head.weight[torch.randperm(config.vocab_size)] = embedding
        reached = _calibrate(model, exit_layer, agreement)
    model.save_pretrained(folder)
    return reached


def make_untrained(folder: Path, like: Path | str) -> None:
    """Write a checkpoint with random weights, which no recipe has touched, in the shape of another or of a name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = _llama_config(like) if isinstance(like, str) else AutoConfig.from_pretrained(like)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _llama_config(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0
    )


def random_prompts(vocab_size: int, count: int, length: int = 64) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (count, length), generator=generator).tolist()


def _calibrate(model: nn.Module, exit_layer: int, agreement: float) -> float:
    """Find the factor of the late layers' outputs by bisection."""
    weights = [weight for name, weight in model.named_parameters() if contributing_layer(name) >= exit_layer]
    current, low, high, reached = 1.0, 0.0, 1.0, 0.0
    for _ in range(CALIBRATION_STEPS):
        factor = (low + high) / 2
        _scale(weights, factor / current)
        current, reached = factor, _agreement(model, exit_layer)
        low, high = (factor, high) if reached > agreement else (low, factor)
    return reached


def _scale(weights: Iterable[torch.Tensor], factor: float) -> None:
    for weight in weights:
        weight.mul_(factor)


def _agreement(model: nn.Module, exit_layer: int) -> float:
    """Share of random tokens on which an exit and the last layer agree."""
    tokens = random_prompts(model.config.vocab_size, 1, CALIBRATION_TOKENS)
    states: Sequence[torch.Tensor] = model(
        torch.tensor(tokens, device=model.device), output_hidden_states=True
    ).hidden_states
    early = model.lm_head(model.model.norm(states[exit_layer]))
    late = model.lm_head(states[-1])
    return (early.argmax(-1) == late.argmax(-1)).float().mean().item()
