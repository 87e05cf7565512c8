"""Models that write text, and what runs them under a grammar."""

from collections.abc import Callable

import pytest
import torch

import layerskip
from layerskip.errors import CheckpointNotFoundError
from layerskip.language_model import LanguageModel

pytest.importorskip("llguidance")


@pytest.fixture(scope="session")
def demo() -> LanguageModel:
    """The embedded model."""
    return layerskip.load("demo")


@pytest.fixture(scope="session")
def random_lm(tiny_checkpoint: Callable[..., object]) -> LanguageModel:
    """A random network with the embedded model's tokenizer; it has no idea what JSON is."""
    folder = tiny_checkpoint(tokenizer=True, num_hidden_layers=5, max_position_embeddings=512, seed=3)
    return layerskip.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2 with its exit adapters, where it is installed."""
    try:
        lm = layerskip.load("smollm2")
    except CheckpointNotFoundError as error:
        pytest.skip(f"smollm2 isn't here: {error}")
    torch.manual_seed(0)
    return lm
