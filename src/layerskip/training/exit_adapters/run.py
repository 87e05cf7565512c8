"""A training run of exit adapters: prepares, trains, evaluates and saves; resumes an interrupted run."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.exit_adapters import WEIGHTS_FILE, read_adapters, write_adapters
from layerskip.checkpoint.loading.adapters import (
    AdapterDescription,
    AdapterSet,
    check_base,
    check_kind,
    describe_base,
    tensor_name,
)
from layerskip.checkpoint.loading.vocabulary import frequent_tokens
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.errors import InvalidArgumentError
from layerskip.training.callbacks import OnStep, ProgressCallback
from layerskip.training.config import TrainingConfig
from layerskip.training.data.block_datasets import BlockDataset
from layerskip.training.data.corpus import Corpus, load_corpus
from layerskip.training.data.fingerprint import check_data
from layerskip.training.data.packing import IGNORED
from layerskip.training.exit_adapters.earlier_values import spread_layers
from layerskip.training.exit_adapters.module import AdaptedModel
from layerskip.training.exit_adapters.state_cache import StateCache
from layerskip.training.exit_adapters.trainer import AdapterEvaluationCallback, AdapterTrainer
from layerskip.training.output.checkpoints import writing
from layerskip.training.output.output_folder import move_files, save_result
from layerskip.training.output.result import TrainingResult
from layerskip.training.precision import choose_precision, set_precision
from layerskip.training.safe_trainer import choose_held_out, run_trainer
from layerskip.training.trainer_arguments import make_arguments

DEFAULT_VOCABULARY = 8192
COUNTED_BLOCKS = 20_000
"""Blocks in which tokens are counted, where the data is streamed."""


def train_adapters(
    config: TrainingConfig,
    output: Path,
    resume: bool,
    on_step: OnStep | None,
    on_message: Callable[[str], None] | None,
) -> TrainingResult:
    """Train adapters, and leave `exit_adapters.json` and `.safetensors` in `output`; arguments as for `run.train`.

    Raises:
        InvalidArgumentError: No model, an exit that it doesn't have, or adapters to go on from that don't fit.
        CheckpointError: The model can't be loaded, or a checkpoint can't be written.
        TrainingError: The loss isn't a finite number.
    """
    started = time.perf_counter()
    say = on_message or (lambda message: None)
    if config.start.model is None:
        raise InvalidArgumentError("exit adapters are trained for a model: name it with model")
    set_seed(config.optimization.seed)
    arguments = make_arguments(config, output)
    checkpoint = open_checkpoint(config.start.model, revision=config.start.revision)
    check_kind(checkpoint.config, checkpoint.name)
    precision, why = choose_precision(config.optimization.precision, checkpoint.config.hidden_size)
    set_precision(arguments, precision)
    say(f"computing in {precision}: {why}")
    say("reading the data")
    if arguments.should_save:
        check_data(output, config.data, resume=resume)
    corpus = load_corpus(config.data, checkpoint.tokenizer)
    if (too_long := corpus.count_long_examples().describe(config.data.sequence_length)) and not config.data.streaming:
        say(too_long)
    say("preparing the model")
    model = load_transformers_model(checkpoint, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    adapted = _make_adapters(config, checkpoint, corpus, model.to(arguments.device)).to(arguments.device)
    if config.adapters.cache_states is not None:
        say(_cache_states(config, arguments, checkpoint, adapted, corpus))
    trainer = _make_trainer(config, arguments, adapted, corpus)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    per_step *= config.data.sequence_length
    if on_step is not None and arguments.process_index == 0:
        trainer.add_callback(ProgressCallback(on_step, tokens_per_step=per_step))
    if on_message is not None and arguments.process_index == 0:
        trainer.add_callback(AdapterEvaluationCallback(on_message, adapted.exits))
    run_trainer(trainer, output, say)
    step = trainer.state.global_step
    if step == arguments.max_steps:
        if trainer.evaluated_step != step and trainer.eval_dataset is not None:
            say("evaluating")
            trainer.evaluate()
        if arguments.should_save:
            _save(trainer, checkpoint, config, output, num_tokens=step * per_step)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = TrainingResult(
        output=str(output),
        interrupted=step < arguments.max_steps,
        step=step,
        num_tokens=step * per_step,
        train_loss=logged[-1] if logged else None,
        loss=None,
        exits=trainer.exit_qualities,
        speedups=trainer.ideal_speedups,
        long_examples=corpus.count_long_examples(),
        precision=precision,
        seconds=time.perf_counter() - started,
    )
    if arguments.should_save:
        save_result(result, output)
    return result


def _make_adapters(config: TrainingConfig, checkpoint: Checkpoint, corpus: Corpus, model: Any) -> AdaptedModel:
    """The frozen model with its adapters: copies of its last layer, or trained ones to go on from."""
    settings, vocab_size = config.adapters, checkpoint.config.vocab_size
    count = settings.adapter_vocabulary
    if count is None:
        count = DEFAULT_VOCABULARY if vocab_size > 2 * DEFAULT_VOCABULARY else vocab_size
    if count > vocab_size:
        raise InvalidArgumentError(f"adapter_vocabulary is {count}, and the model's vocabulary has {vocab_size} tokens")
    tokens: Sequence[int] | None = None if count == vocab_size else _frequent(checkpoint, corpus, count)
    start = None
    if settings.adapters_from is not None:
        start = read_adapters(Path(settings.adapters_from).expanduser())
        check_base(start, checkpoint.name, checkpoint.network_config, checkpoint.weights)
        tokens = _same_tokens(start, settings.exit_adapters)
    layers: Sequence[int] = ()
    if start is not None:
        layers = start.adapters[0].value_layers
    elif settings.adapter_value_layers:
        layers = spread_layers(checkpoint.config.num_layers, settings.adapter_value_layers)
    adapted = AdaptedModel(
        model, settings.exit_adapters, loss=settings.adapter_loss, tokens=tokens, value_layers=layers
    )
    if start is not None:
        _load_weights(adapted, start)
    return adapted


def _cache_states(
    config: TrainingConfig, arguments: TrainingArguments, checkpoint: Checkpoint, adapted: AdaptedModel, corpus: Corpus
) -> str:
    """Keep the frozen model's states on disk; each process keeps its own. Returns what to tell the user."""
    if not isinstance(corpus.train, BlockDataset):
        raise InvalidArgumentError(
            "cache_states keeps the states of all blocks, and streaming doesn't say how many there are; leave one out"
        )
    assert config.adapters.cache_states is not None
    folder = Path(config.adapters.cache_states).expanduser() / str(arguments.process_index)
    base = describe_base(checkpoint.name, checkpoint.network_config, checkpoint.weights)
    cache = StateCache(
        folder,
        num_blocks=len(corpus.train) + len(corpus.held_out),
        length=config.data.sequence_length,
        channels=adapted.frozen.channels,
        dtype=adapted.head_dtype,
        states_of={"weights": base.weights_hash, "exits": adapted.exits, "value_layers": adapted.value_layers},
    )
    adapted.frozen.state_cache = cache
    return (
        f"keeping the model's states in {folder}: {cache.num_bytes / 1e9:.1f} GB for all blocks, {len(cache)} are there"
    )


def _frequent(checkpoint: Checkpoint, corpus: Corpus, count: int) -> Sequence[int]:
    """The most frequent of the tokens that are learned, and those that end an answer."""
    counts: Counter[int] = Counter()
    for block in islice(iter(corpus.train), COUNTED_BLOCKS):
        labels = block.get("labels", block["input_ids"])
        counts.update(labels[labels != IGNORED].tolist())
    ranked = [token for token, _ in counts.most_common()]
    ends = {*checkpoint.eos_token_ids, *checkpoint.tokenizer.all_special_ids}
    return frequent_tokens(ranked, count, checkpoint.config.vocab_size, sorted(ends))


def _same_tokens(start: AdapterSet, exits: tuple[int, ...]) -> Sequence[int] | None:
    """The tokens of adapters to go on from."""
    by_exit = {adapter.exit_layer: adapter for adapter in start.adapters}
    for exit_layer in exits:
        if exit_layer not in by_exit:
            raise InvalidArgumentError(
                f"adapters_from {start.folder} has adapters for exits {', '.join(map(str, by_exit))}, and not for "
                f"{exit_layer}; name exits that it has"
            )
    weights = _read_weights(start)
    found = [weights.get(tensor_name(exit_layer, "token_ids")) for exit_layer in exits]
    tokens = [None if ids is None else ids.tolist() for ids in found]
    if any(ids != tokens[0] for ids in tokens):
        raise InvalidArgumentError(f"the adapters in {start.folder} draft different tokens; train them one by one")
    return tokens[0]


def _read_weights(start: AdapterSet) -> dict[str, torch.Tensor]:
    assert start.folder is not None
    return load_file(start.folder / WEIGHTS_FILE)


def _load_weights(adapted: AdaptedModel, start: AdapterSet) -> None:
    weights = _read_weights(start)
    for exit_layer in adapted.exits:
        prefix = tensor_name(exit_layer, "")
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        own.pop("token_ids", None)
        adapted.adapters[f"exit_{exit_layer}"].load_state_dict(own)


def _make_trainer(
    config: TrainingConfig, arguments: TrainingArguments, adapted: AdaptedModel, corpus: Corpus
) -> AdapterTrainer:
    held_out = choose_held_out(arguments, corpus)
    arguments.label_names = ["labels"]
    arguments.prediction_loss_only = True
    trainer = AdapterTrainer(
        adapted,
        arguments,
        train_dataset=corpus.train,
        eval_dataset=held_out,
        data_collator=torch.utils.data.default_collate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokens_before(config: TrainingConfig) -> int:
    """Tokens that the adapters to go on from had been trained on."""
    if config.adapters.adapters_from is None:
        return 0
    return int(read_adapters(Path(config.adapters.adapters_from).expanduser()).training.get("tokens", 0))


def _save(
    trainer: AdapterTrainer, checkpoint: Checkpoint, config: TrainingConfig, output: Path, *, num_tokens: int
) -> None:
    """Write the trained adapters into the run's folder."""
    adapted, tensors = trainer.adapted, {}
    dtype = torch.float32 if config.checkpoints.save_dtype == "float32" else torch.bfloat16
    for exit_layer in adapted.exits:
        for name, value in adapted.adapters[f"exit_{exit_layer}"].state_dict().items():
            tensors[tensor_name(exit_layer, name)] = value.detach().to("cpu", dtype).contiguous()
        if adapted.tokens is not None:
            tensors[tensor_name(exit_layer, "token_ids")] = adapted.tokens.to(torch.int32).clone()
    qualities = {quality.exit_layer: quality for quality in trainer.exit_qualities}
    seen = dict(zip(adapted.exits, trainer.statistics.seen.tolist(), strict=True))
    found = AdapterSet(
        base=describe_base(checkpoint.name, checkpoint.network_config, checkpoint.weights),
        adapters=tuple(
            AdapterDescription(
                exit_layer=exit_layer,
                vocabulary_size=None if adapted.tokens is None else len(adapted.tokens),
                value_layers=adapted.value_layers,
                agreement=round(qualities[exit_layer].agreement, 4) if exit_layer in qualities else None,
                by_confidence=tuple((int(agreed), int(tokens)) for agreed, tokens in seen[exit_layer]),
            )
            for exit_layer in adapted.exits
        ),
        training={
            "loss": config.adapters.adapter_loss,
            "tokens": num_tokens + _tokens_before(config),
            "sequence_length": config.data.sequence_length,
            "learning_rate": config.optimization.learning_rate,
            "batch_size": config.optimization.batch_size,
            "data": [Path(source).name for source in config.data.data],
        },
    )
    with writing(output, "the exit adapters") as staging:
        write_adapters(staging, found, tensors)
        move_files(staging, output, last="exit_adapters.json")
