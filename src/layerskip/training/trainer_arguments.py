"""transformers' `TrainingArguments` from the settings of a run."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from layerskip.errors import InvalidArgumentError
from layerskip.training.config import TrainingConfig


def make_arguments(config: TrainingConfig, output: Path) -> TrainingArguments:
    """Transformers' settings for a run, without the precision, which depends on the model."""
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in config.checkpoints.report_to:
        if name not in available:
            installed = ", ".join(available) or "none"
            raise InvalidArgumentError(
                f"report_to: {name!r} is unknown or its package isn't installed; those that are: {installed}"
            )
    optimization, checkpoints = config.optimization, config.checkpoints
    known = TrainingArguments.__dataclass_fields__
    # transformers 5.24 renamed it and warns about the old name.
    recompute = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    has_held_out = config.data.held_out > 0
    on_cpu = not torch.accelerator.is_available()
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": optimization.max_steps,
        "per_device_train_batch_size": optimization.batch_size,
        "per_device_eval_batch_size": optimization.batch_size,
        "gradient_accumulation_steps": optimization.gradient_accumulation,
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimization.min_learning_rate},
        "warmup_steps": optimization.warmup_steps,
        "weight_decay": optimization.weight_decay,
        "adam_beta2": optimization.adam_beta2,
        "max_grad_norm": optimization.max_grad_norm,
        "torch_compile": optimization.compile,
        "fsdp": "full_shard" if optimization.fsdp else None,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} if optimization.fsdp else None,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "ddp_find_unused_parameters": False,  # the last exit always has a loss, so every parameter has a gradient
        "seed": optimization.seed,
        "data_seed": optimization.seed,
        "dataloader_drop_last": True,  # every process has the same number of samples in every batch
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "save_steps": checkpoints.save_steps,
        "save_total_limit": checkpoints.keep,
        "eval_strategy": "steps" if has_held_out else "no",
        "eval_steps": checkpoints.eval_steps,
        "logging_steps": checkpoints.log_steps,
        "logging_nan_inf_filter": False,  # such a loss ends the run
        "report_to": list(checkpoints.report_to) or "none",
        "disable_tqdm": True,
    }
    if optimization.gradient_checkpointing:
        settings[recompute] = True
    return TrainingArguments(**settings)
