"""The model and tokenizer that training starts from: a trained model, or random weights in a given shape."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.checkpoint import WAYS_TO_NAME, Checkpoint, open_checkpoint
from layerskip.checkpoint.loading.placement import DTYPES
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.errors import CheckpointError, InvalidArgumentError, TokenizerError, UnsupportedModelError
from layerskip.training.config import StartConfig, TrainingConfig
from layerskip.training.data.corpus import corpus_texts
from layerskip.training.data.tokenizer import train_tokenizer
from layerskip.training.output.saved_config import generation_settings, settle_generation_config
from layerskip.training.sizes import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """A model to train, and its tokenizer."""

    model: Any
    """A causal model of transformers in float32, or peft's wrapper of one."""
    tokenizer: "PreTrainedTokenizerBase"
    dtype: torch.dtype = torch.float32
    """Type of the weights that were loaded."""
    left_out: tuple[str, ...] = ()
    """Names of the model's generation settings that transformers refuses to save."""


def make_starting_point(config: TrainingConfig, *, tokenizer_folder: Path) -> StartingPoint:
    """Load the model that training continues, or make one with random weights.

    Args:
        config: The run's settings; `start` says which.
        tokenizer_folder: Folder where a tokenizer that is trained is saved, and from which a resumed run loads it.

    Raises:
        InvalidArgumentError: Neither a model nor a shape is named, a vocabulary is too small for the tokenizer, or
            blocks are longer than the model's context.
        CheckpointError: The model, shape or tokenizer can't be read.
    """
    start = config.start
    if start.model is not None:
        checkpoint = open_checkpoint(start.model, revision=start.revision)
        point = _trained(checkpoint)
    elif start.config is not None:
        point = _from_scratch(config, tokenizer_folder)
    else:
        raise InvalidArgumentError(
            f"nothing to train: name a model ({WAYS_TO_NAME}), or a shape to train from scratch with config ("
            f"{', '.join(SIZES)}, or the config.json of a model)"
        )
    _check_fit(point, config)
    return _with_adapters(point, start) if start.lora_rank is not None else point


def _trained(checkpoint: Checkpoint) -> StartingPoint:
    """A checkpoint's model and tokenizer."""
    raw = checkpoint.raw_config
    own = raw.get("dtype") or raw.get("torch_dtype")
    generation, left_out = settle_generation_config(generation_settings(checkpoint.generation_config, raw))
    return StartingPoint(
        model=load_transformers_model(checkpoint, torch.float32, generation),
        tokenizer=checkpoint.tokenizer,
        dtype=DTYPES.get(str(own), torch.float32),
        left_out=tuple(left_out),
    )


def _from_scratch(config: TrainingConfig, tokenizer_folder: Path) -> StartingPoint:
    from transformers import AutoModelForCausalLM

    start = config.start
    shape = _read_shape(start)
    if start.tokenizer is not None:
        tokenizer = open_checkpoint(start.tokenizer).tokenizer
    elif (tokenizer_folder / "tokenizer.json").is_file():
        tokenizer = Checkpoint.in_folder(tokenizer_folder).tokenizer
    else:
        tokenizer = train_tokenizer(corpus_texts(config.data), start.vocab_size or shape.vocab_size)
    if start.vocab_size is not None or start.config in SIZES:
        shape.vocab_size = max(len(tokenizer), start.vocab_size or 0)
    shape.bos_token_id, shape.eos_token_id, shape.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    torch.manual_seed(config.optimization.seed)
    try:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except Exception as error:  # sizes that contradict each other fail deep inside transformers
        raise UnsupportedModelError(f"transformers can't make a causal model from {start.config}: {error}") from error
    model.generation_config.bos_token_id = shape.bos_token_id
    model.generation_config.eos_token_id = shape.eos_token_id
    model.generation_config.pad_token_id = shape.pad_token_id
    return StartingPoint(model=model, tokenizer=tokenizer)


def _read_shape(start: StartConfig) -> "PreTrainedConfig":
    from transformers import AutoConfig, LlamaConfig

    name = str(start.config)
    if name in SIZES:
        return LlamaConfig(**SIZES[name], tie_word_embeddings=True)
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        file = path
    else:
        folder = open_checkpoint(name).hugging_face_folder
        if folder is None:
            raise CheckpointError(
                f"{name} is a GGUF file, which has no config.json; name a config.json, a checkpoint in Hugging Face's "
                f"format, or one of the shapes {', '.join(SIZES)}"
            )
        file = folder / "config.json"
    try:
        shape: PreTrainedConfig = AutoConfig.from_pretrained(file, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} is not a configuration that transformers knows: {error}") from error
    return shape


def _check_fit(point: StartingPoint, config: TrainingConfig) -> None:
    shape = point.model.config.get_text_config()
    if len(point.tokenizer) > shape.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {len(point.tokenizer)} tokens, and the model a vocabulary of {shape.vocab_size}; "
            "give the tokenizer that belongs to the model, or a shape with a larger vocab_size"
        )
    limit = getattr(shape, "max_position_embeddings", None)
    length = config.data.sequence_length
    if limit is not None and length > limit:
        raise InvalidArgumentError(f"sequence_length is {length} tokens, and the model's context {limit}; lower it")


def _with_adapters(point: StartingPoint, start: StartConfig) -> StartingPoint:
    """The frozen model with LoRA adapters on all matrices of its layers."""
    from peft import LoraConfig, get_peft_model

    assert start.lora_rank is not None
    adapters = LoraConfig(
        r=start.lora_rank,
        lora_alpha=start.lora_alpha or 2 * start.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return replace(point, model=get_peft_model(point.model, adapters))
