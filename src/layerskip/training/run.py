"""A training run from settings to a checkpoint: prepares, trains, evaluates, saves; goes on where one has stopped."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.evaluation.exits import ExitQuality
from layerskip.evaluation.speedup import IdealSpeedup
from layerskip.training.callbacks import (
    LOG_FILE,
    AlreadyFinished,
    FinishedCallback,
    InterruptCallback,
    LogCallback,
    OnStep,
    ProgressCallback,
)
from layerskip.training.checkpoints import list_checkpoints, writing
from layerskip.training.config import TrainingConfig
from layerskip.training.data.block_datasets import BlockDataset
from layerskip.training.data.corpus import Corpus, load_corpus
from layerskip.training.settings_file import read_settings, write_settings
from layerskip.training.starting_point import StartingPoint, make_starting_point
from layerskip.training.trainer import LayerSkipTrainer

SETTINGS_FILE = "training.toml"
RESULT_FILE = "training.json"
WARMUP_SHARE, MOST_WARMUP_STEPS = 20, 2000


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run has reached."""

    output: str
    """Its folder; a checkpoint in Hugging Face's format, unless interrupted."""
    interrupted: bool
    """Whether it was stopped before its last step; it can be resumed."""
    step: int
    """Optimizer steps done."""
    num_tokens: int
    """Tokens in those steps, of all processes."""
    train_loss: float | None
    """J at the last entry of the log, nats."""
    loss: float | None
    """The last layer's loss on the held-out data, nats; None if nothing was held out."""
    exits: list[ExitQuality]
    """Every exit on the held-out data."""
    speedups: list[IdealSpeedup]
    """The best that each exit could do."""
    seconds: float
    """Of this run, all included, since it started or resumed."""


def train(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_message: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train a model, and leave a checkpoint in Hugging Face's format in `output`.

    Works in one process, and in each of those that torchrun or `accelerate launch` starts.

    Args:
        config: All settings.
        output: Folder of the run.
        resume: Go on from the last checkpoint in `output`; from the start where there is none yet.
        on_step: Called after each optimizer step.
        on_message: Called with what is being prepared, a line at a time.

    Raises:
        InvalidArgumentError: Settings that don't fit together, or `output` holds another run.
        CheckpointError: The model can't be loaded, or a checkpoint can't be written.
        TrainingError: The loss isn't a finite number.
    """
    started = time.perf_counter()
    say = on_message or (lambda message: None)
    config = resolve(config)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun or accelerate has started
        _claim(output, config, resume)
    set_seed(config.optimization.seed)
    say("preparing the model")
    arguments = make_arguments(config, output)
    with arguments.main_process_first(desc="tokenizer"):
        point = make_starting_point(config, tokenizer_folder=output)
        if arguments.should_save:
            with writing(output, "the tokenizer") as staging:
                point.tokenizer.save_pretrained(staging)
                # tokenizer.json comes last: where it is, a run that resumes takes it for the whole.
                for path in sorted(staging.iterdir(), key=lambda path: path.name == "tokenizer.json"):
                    os.replace(path, output / path.name)
    say("reading the data")
    corpus = load_corpus(config.data, point.tokenizer)
    trainer = _make_trainer(config, arguments, point, corpus)
    interrupt = InterruptCallback(trainer)
    trainer.add_callback(LogCallback(output))
    trainer.add_callback(interrupt)
    tokens_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens_per_step *= config.data.sequence_length
    if on_step is not None and arguments.process_index == 0:
        trainer.add_callback(ProgressCallback(on_step, tokens_per_step=tokens_per_step))
    trainer.add_callback(FinishedCallback())
    checkpoints = list_checkpoints(output)
    set_seed(config.optimization.seed)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    except AlreadyFinished:
        pass
    finally:
        interrupt.restore()
    step = trainer.state.global_step
    if step == arguments.max_steps:
        if trainer.evaluated_step != step and len(corpus.held_out):
            say("evaluating")
            trainer.evaluate()
        save_final(trainer, output, dtype=_dtype_to_save(config, point))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = TrainingResult(
        output=str(output),
        interrupted=step < arguments.max_steps,
        step=step,
        num_tokens=step * tokens_per_step,
        train_loss=logged[-1] if logged else None,
        loss=trainer.exit_qualities[-1].loss if trainer.exit_qualities else None,
        exits=trainer.exit_qualities,
        speedups=trainer.ideal_speedups,
        seconds=time.perf_counter() - started,
    )
    if arguments.should_save:
        try:
            write_atomically(output / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"{output / RESULT_FILE} can't be written: {error.strerror}; make room") from error
    return result


def resolve(config: TrainingConfig) -> TrainingConfig:
    """Settings with every default that depends on others filled in."""
    start, optimization = config.start, config.optimization
    schedule = config.recipe.dropout_schedule or ("exponential" if start.from_scratch else "constant")
    rate = 8e-4 if start.from_scratch else 1e-4 if start.lora_rank is not None else 3e-5
    warmup = min(MOST_WARMUP_STEPS, optimization.max_steps // WARMUP_SHARE)
    return replace(
        config,
        recipe=replace(config.recipe, dropout_schedule=schedule),
        optimization=replace(
            optimization,
            learning_rate=rate if optimization.learning_rate is None else optimization.learning_rate,
            warmup_steps=warmup if optimization.warmup_steps is None else optimization.warmup_steps,
        ),
    )


def _claim(output: Path, config: TrainingConfig, resume: bool) -> None:
    """Make `output` the folder of this run, or check that it is."""
    file = output / SETTINGS_FILE
    if not resume:
        if output.is_file():
            raise InvalidArgumentError(f"{output} is a file; name a folder")
        if (output / LOG_FILE).exists() or list_checkpoints(output):
            raise InvalidArgumentError(f"{output} already holds a training run; resume it, or choose another folder")
        if not file.exists() and any((output / name).exists() for name in ("config.json", "tokenizer.json")):
            raise InvalidArgumentError(f"{output} holds a model, which training would overwrite; choose another folder")
    elif not file.is_file():
        raise InvalidArgumentError(f"there is no run to resume in {output}: it has no {SETTINGS_FILE}")
    else:
        changed = _differences(read_settings(file, TrainingConfig), config)
        if changed:
            raise InvalidArgumentError(
                f"{output} holds a run with other settings, so it can't be resumed with these: {'; '.join(changed)}"
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not resume:  # a run that failed before its first step may have left a tokenizer of other data
            (output / "tokenizer.json").unlink(missing_ok=True)
        write_atomically(file, write_settings(config))
    except OSError as error:
        raise InvalidArgumentError(f"{output} can't be written to: {error.strerror}") from error


def _differences(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    """Settings that change what is learned, with both values; how often things are saved doesn't."""
    old, new = asdict(before), asdict(now)
    return [
        f"{name} was {old[table][name]} and is {value}"
        for table in new
        if table != "checkpoints"
        for name, value in new[table].items()
        if old[table][name] != value
    ]


def make_arguments(config: TrainingConfig, output: Path) -> TrainingArguments:
    """Transformers' settings for a run."""
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in config.checkpoints.report_to:
        if name not in available:
            installed = ", ".join(available) or "none"
            raise InvalidArgumentError(
                f"report_to: {name!r} is unknown or its package isn't installed; those that are: {installed}"
            )
    optimization, checkpoints = config.optimization, config.checkpoints
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
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
        "bf16": optimization.precision == "bfloat16" or (optimization.precision == "auto" and has_bfloat16),
        "torch_compile": optimization.compile,
        "fsdp": "full_shard" if optimization.fsdp else None,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} if optimization.fsdp else None,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "ddp_find_unused_parameters": False,  # the last exit's loss is always on: every parameter has a gradient
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


def _make_trainer(
    config: TrainingConfig, arguments: TrainingArguments, point: StartingPoint, corpus: Corpus
) -> LayerSkipTrainer:
    held_out: Any = corpus.held_out
    whole = arguments.per_device_eval_batch_size * arguments.world_size
    if isinstance(corpus.train, BlockDataset) and len(corpus.train) < whole:
        raise InvalidArgumentError(
            f"the data gives {len(corpus.train)} blocks to train on, and a batch of all processes has {whole}; "
            "add data, or lower batch_size or sequence_length"
        )
    if arguments.world_size > 1 and len(held_out) > whole:  # processes get whole batches: nothing is counted twice
        held_out = torch.utils.data.Subset(held_out, range(len(held_out) // whole * whole))
    if not len(held_out):  # its share was too small for any text
        arguments.eval_strategy = IntervalStrategy.NO
    trainer = LayerSkipTrainer(
        point.model,
        arguments,
        layerskip=config.recipe,
        train_dataset=corpus.train,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=point.tokenizer,
        data_collator=torch.utils.data.default_collate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


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
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    with writing(output, "the trained model") as staging:
        model.save_pretrained(staging, state_dict=weights)
        model.config.dtype = dtype  # of the file; it has written that of the weights in memory
        model.config.save_pretrained(staging)
        # config.json comes last: until it is there, the folder isn't a checkpoint.
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, output / path.name)


def _dtype_to_save(config: TrainingConfig, point: StartingPoint) -> torch.dtype:
    if config.checkpoints.save_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            config.checkpoints.save_dtype
        ]
    return point.dtype


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
