"""Tiny random models of several families, to attach the recipe to."""

import copy
from typing import Any, Protocol

import pytest

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 5},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "smollm3": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # layers return tuples
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}


class TinyModel(Protocol):
    """Makes a model of four layers in float32, in training mode; the weights are the same each time."""

    def __call__(self, family: str = "llama", **config: Any) -> Any: ...


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Any) -> TinyModel:
    from transformers import AutoModelForCausalLM

    made: dict[str, Any] = {}

    def make(family: str = "llama", **config: Any) -> Any:
        key = f"{family} {config}"
        if key not in made:
            folder = tiny_checkpoint(family, **{**FAMILIES[family], **config})
            made[key] = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()
        return copy.deepcopy(made[key])

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)
