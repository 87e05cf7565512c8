"""A training run from settings to a checkpoint: prepares, trains, evaluates and saves; resumes an interrupted run."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from layerskip.training.callbacks import EvaluationCallback, OnStep, ProgressCallback
from layerskip.training.config import TrainingConfig
from layerskip.training.data.corpus import Corpus, load_corpus
from layerskip.training.data.fingerprint import check_data
from layerskip.training.exit_adapters.run import train_adapters
from layerskip.training.final_model import save_final
from layerskip.training.output.output_folder import claim, dtype_to_save, save_result, save_tokenizer
from layerskip.training.output.result import TrainingResult
from layerskip.training.output.saved_config import add_end_of_turn
from layerskip.training.precision import choose_precision, set_precision
from layerskip.training.safe_trainer import choose_held_out, run_trainer
from layerskip.training.starting_point import StartingPoint, make_starting_point
from layerskip.training.trainer import LayerSkipTrainer
from layerskip.training.trainer_arguments import make_arguments

WARMUP_SHARE, MOST_WARMUP_STEPS = 20, 2000
ADAPTER_LEARNING_RATE = 1e-3


def train(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_message: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train a model, and leave a checkpoint in Hugging Face's format in `output`; or exit adapters for a model.

    Runs in one process, or in every process that torchrun or `accelerate launch` starts.

    Args:
        config: All settings.
        output: Folder of the run.
        resume: Continue from the last checkpoint in `output`, or from the start if there is none.
        on_step: Called after each optimizer step.
        on_message: Called with one line for each preparation step and for the result of each evaluation.

    Raises:
        InvalidArgumentError: Settings that contradict each other, or `output` contains another run.
        CheckpointError: The model can't be loaded, or a checkpoint can't be written.
        TrainingError: The loss isn't a finite number.
    """
    config = resolve(config)
    is_first = os.environ.get("RANK", "0") == "0"  # the process group of torchrun or accelerate
    with claim(output, config, resume) if is_first else nullcontext():
        if config.adapters.exit_adapters:
            return train_adapters(config, output, resume, on_step, on_message)
        return _train(config, output, resume, on_step, on_message)


def _train(
    config: TrainingConfig,
    output: Path,
    resume: bool,
    on_step: OnStep | None,
    on_message: Callable[[str], None] | None,
) -> TrainingResult:
    """`train`, with every default resolved and the folder claimed."""
    started = time.perf_counter()
    say = on_message or (lambda message: None)
    set_seed(config.optimization.seed)
    say("preparing the model")
    arguments = make_arguments(config, output)
    with arguments.main_process_first(desc="tokenizer"):
        point = make_starting_point(config, tokenizer_folder=output)
        if arguments.should_save:
            save_tokenizer(point.tokenizer, output)
    precision, why = choose_precision(config.optimization.precision, point.model.config.get_text_config().hidden_size)
    set_precision(arguments, precision)
    say(f"computing in {precision}: {why}")
    if point.left_out:
        say(f"left out of generation_config.json, not being valid there: {', '.join(point.left_out)}")
    say("reading the data")
    if arguments.should_save:
        check_data(output, config.data, resume=resume)
    corpus = load_corpus(config.data, point.tokenizer)
    if (too_long := corpus.count_long_examples().describe(config.data.sequence_length)) and not config.data.streaming:
        say(too_long)
    trainer = _make_trainer(config, arguments, point, corpus)
    tokens_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens_per_step *= config.data.sequence_length
    if on_step is not None and arguments.process_index == 0:
        trainer.add_callback(ProgressCallback(on_step, tokens_per_step=tokens_per_step))
    if on_message is not None and arguments.process_index == 0:
        trainer.add_callback(EvaluationCallback(on_message))
    run_trainer(trainer, output, say)
    step = trainer.state.global_step
    if step == arguments.max_steps:
        if trainer.evaluated_step != step and trainer.eval_dataset is not None:
            say("evaluating")
            trainer.evaluate()
        save_final(trainer, output, dtype=dtype_to_save(config, point.dtype))
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
        long_examples=corpus.count_long_examples(),
        precision=precision,
        seconds=time.perf_counter() - started,
    )
    if arguments.should_save:
        save_result(result, output)
    return result


def resolve(config: TrainingConfig) -> TrainingConfig:
    """The settings with every default resolved that depends on other settings."""
    start, optimization = config.start, config.optimization
    schedule = config.recipe.dropout_schedule or ("exponential" if start.from_scratch else "constant")
    rate = 8e-4 if start.from_scratch else 1e-4 if start.lora_rank is not None else 3e-5
    rate = ADAPTER_LEARNING_RATE if config.adapters.exit_adapters else rate
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


def _make_trainer(
    config: TrainingConfig, arguments: TrainingArguments, point: StartingPoint, corpus: Corpus
) -> LayerSkipTrainer:
    held_out = choose_held_out(arguments, corpus)
    trainer = LayerSkipTrainer(
        point.model,
        arguments,
        layerskip=config.recipe,
        train_dataset=corpus.train,
        eval_dataset=held_out,
        processing_class=point.tokenizer,
        data_collator=torch.utils.data.default_collate,
    )
    trainer.remove_callback(PrinterCallback)
    if corpus.has_conversations:
        add_end_of_turn(trainer.recipe.model, point.tokenizer)
    return trainer
