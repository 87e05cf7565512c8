"""Small transformers models, and what plain decoding gives with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contributing_layer, write_agreeing, write_tiny

LAYERS = 5
Families = Callable[[str], Any]


@pytest.fixture(scope="session")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of five layers whose exits agree with its last layer now and then."""
    folder = tmp_path_factory.mktemp("agreeing")
    write_agreeing(folder, layers=LAYERS)
    return load(folder)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A factory of small models of any family; the last two of four layers contribute little."""
    models: dict[str, Any] = {}

    def make(model_type: str) -> Any:
        if model_type not in models:
            folder = tmp_path_factory.mktemp(model_type)
            # A tied head would let some families repeat one token for ever.
            write_tiny(folder, model_type, tie_word_embeddings=False, **WINDOWS.get(model_type, {}))
            models[model_type] = load(folder)
            with torch.no_grad():
                for name, weight in models[model_type].named_parameters():
                    if contributing_layer(name) >= 2 or "layers.2.post_" in name or "layers.3.post_" in name:
                        weight.mul_(0.3)
        return models[model_type]

    return make


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}
"""Windows that texts of these tests outgrow."""


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def prompt() -> Callable[..., torch.Tensor]:
    """Random prompts, [rows, length], the same for the same arguments."""

    def make(rows: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make
