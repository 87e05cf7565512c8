"""layerskip: train, decode and verify models whose early layers can already predict.

import layerskip

lm = layerskip.load("demo")
print(lm.generate(["def add(a, b):"], max_new_tokens=32)[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.checkpoint.loading.config import LoadingConfig
    from layerskip.decoding.config import GenerationConfig
    from layerskip.decoding.output.events import DraftEvent, FinishEvent, GenerationResult, StreamEvent, TokenEvent
    from layerskip.decoding.output.stream import GenerationStream
    from layerskip.decoding.scoring import Score
    from layerskip.decoding.stats import GenerationStats
    from layerskip.errors import LayerSkipError
    from layerskip.language_model import LanguageModel, Session, load
    from layerskip.machine import __version__
    from layerskip.training.config import (
        CheckpointConfig,
        ExitAdapterConfig,
        LayerSkipConfig,
        OptimizationConfig,
        StartConfig,
        TrainingConfig,
    )
    from layerskip.training.data.config import DataConfig
    from layerskip.training.output.result import TrainingResult
    from layerskip.training.recipe.recipe import LayerSkipRecipe
    from layerskip.training.run import train
    from layerskip.training.trainer import LayerSkipTrainer

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DraftEvent",
    "ExitAdapterConfig",
    "FinishEvent",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStats",
    "GenerationStream",
    "LanguageModel",
    "LayerSkipConfig",
    "LayerSkipError",
    "LayerSkipRecipe",
    "LayerSkipTrainer",
    "LoadingConfig",
    "OptimizationConfig",
    "Score",
    "Session",
    "StartConfig",
    "StreamEvent",
    "TokenEvent",
    "TrainingConfig",
    "TrainingResult",
    "__version__",
    "load",
    "train",
]

_MODULES = {
    "GenerationConfig": "decoding.config",
    "Score": "decoding.scoring",
    "GenerationStats": "decoding.stats",
    **dict.fromkeys(
        ("DraftEvent", "FinishEvent", "GenerationResult", "StreamEvent", "TokenEvent"), "decoding.output.events"
    ),
    "GenerationStream": "decoding.output.stream",
    "LayerSkipError": "errors",
    "LoadingConfig": "checkpoint.loading.config",
    **dict.fromkeys(("LanguageModel", "Session", "load"), "language_model"),
    **dict.fromkeys(
        (
            "CheckpointConfig",
            "ExitAdapterConfig",
            "LayerSkipConfig",
            "OptimizationConfig",
            "StartConfig",
            "TrainingConfig",
        ),
        "training.config",
    ),
    "__version__": "machine",
    "DataConfig": "training.data.config",
    "LayerSkipRecipe": "training.recipe.recipe",
    "LayerSkipTrainer": "training.trainer",
    "TrainingResult": "training.output.result",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `import layerskip` itself costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module 'layerskip' has no attribute {name!r}")
    return getattr(import_module(f"layerskip.{_MODULES[name]}"), name)
