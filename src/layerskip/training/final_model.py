"""The trained model as a plain checkpoint in the run's folder."""

from pathlib import Path
from typing import Any

import torch

from layerskip.training.output.checkpoints import writing
from layerskip.training.output.output_folder import move_files
from layerskip.training.trainer import LayerSkipTrainer


def save_final(trainer: LayerSkipTrainer, output: Path, *, dtype: torch.dtype) -> None:
    """Write the trained model into the run's folder, as a plain checkpoint without adapters."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        weights = model.state_dict()
    model = trainer.recipe.model
    model.config.use_cache = True  # Trainer has switched it off
    tied = _tied_names(model)  # conversion would make them separate tensors
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in weights.items()
        if name not in tied
    }
    with writing(output, "the trained model") as staging:
        model.save_pretrained(staging, state_dict=weights)
        model.config.dtype = dtype  # the file's type; save_pretrained wrote the type in memory
        model.config.save_pretrained(staging)
        # config.json comes last: until it is there, the folder isn't a checkpoint.
        move_files(staging, output, last="config.json")


def _tied_names(model: Any) -> set[str]:
    """Names of parameters that repeat an earlier one, such as a tied LM head."""
    seen: set[int] = set()
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            tied.add(name)
        seen.add(id(parameter))
    return tied
