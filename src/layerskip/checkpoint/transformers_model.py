"""The same checkpoint as a model of transformers: to train it, and to compare with it."""

from pathlib import Path
from typing import Any

import torch

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.folder import HuggingFaceFolder
from layerskip.errors import UnsupportedModelError, brief


def load_transformers_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A causal language model of transformers, on the CPU.

    A checkpoint in another format than Hugging Face's is loaded from its tensors, quantized ones dequantized.

    Args:
        checkpoint: What to load.
        dtype: Type of the weights.

    Raises:
        UnsupportedModelError: transformers can't load it.
        CheckpointError: Its files are damaged or incomplete.
    """
    source = checkpoint.weights  # its errors name what is missing; transformers would start with random weights
    in_folder = isinstance(checkpoint.files, HuggingFaceFolder)
    tensors = {} if in_folder else {name: source.get(name).to(dtype) for name in source.names()}
    try:
        return _from_folder(checkpoint.folder, dtype) if in_folder else _from_tensors(checkpoint, tensors, dtype)
    except Exception as error:  # transformers raises nearly anything here
        raise UnsupportedModelError(
            f"transformers can't load {checkpoint.name} as a causal language model: {brief(error)}"
        ) from error


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def _from_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    options = dict(checkpoint.raw_config)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        **checkpoint.generation_config
    )
    return model
