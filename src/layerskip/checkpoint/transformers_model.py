"""The same checkpoint as a model of transformers: to train it, and to compare with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.errors import UnsupportedModelError, brief

if TYPE_CHECKING:
    from transformers import GenerationConfig


def load_transformers_model(
    checkpoint: Checkpoint, dtype: torch.dtype, generation_config: "GenerationConfig | None" = None
) -> Any:
    """A causal language model of transformers, on the CPU.

    A quantized checkpoint, or one in another format than Hugging Face's, is loaded from its tensors, dequantized.

    Args:
        checkpoint: What to load.
        dtype: Type of the weights.
        generation_config: The model's settings of generation. If not given, none but transformers' defaults: what a
            checkpoint's generation_config.json sets (penalties, temperature) would act in `generate` unseen.

    Raises:
        UnsupportedModelError: transformers can't load it.
        CheckpointError: Its files are damaged or incomplete.
    """
    from transformers import GenerationConfig

    source = checkpoint.weights  # its errors name what is missing; transformers would start with random weights
    raw_config = dict(checkpoint.raw_config)
    folder = checkpoint.hugging_face_folder if raw_config.pop("quantization_config", None) is None else None
    tensors = {} if folder is not None else {name: source.get(name).to(dtype) for name in source.names()}
    settings = generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        if folder is not None:
            return _from_folder(folder, dtype, settings)
        return _from_tensors(raw_config, tensors, dtype, settings)
    except Exception as error:  # transformers raises nearly anything here
        raise UnsupportedModelError(
            f"transformers can't load {checkpoint.name} as a causal language model: {brief(error)}"
        ) from error


def _from_folder(folder: Path, dtype: torch.dtype, settings: "GenerationConfig") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, generation_config=settings)


def _from_tensors(
    raw_config: Mapping[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype, settings: "GenerationConfig"
) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    options = dict(raw_config)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, generation_config=settings)
