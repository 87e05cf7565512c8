"""Chooses bfloat16 or float32 for training: bfloat16 if the hardware has it and the model is wide enough to gain."""

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

MIN_CPU_WIDTH = 128
"""Channels of the narrowest model that a CPU trains faster in bfloat16. Measured on one core with AVX512_BF16,
processor seconds of a step in float32 divided by bfloat16: 0.7 at width 32, 1.0 at 64, 1.3 at 128, 1.4 at 192, 1.3 at
576."""
Precision = Literal["float32", "bfloat16"]


def choose_precision(asked: Literal["auto", "float32", "bfloat16"], hidden_size: int) -> tuple[Precision, str]:
    """The precision to compute in, and the reason in a few words.

    Args:
        asked: The setting `precision`.
        hidden_size: Channels of the model.
    """
    if asked != "auto":
        return asked, "as asked"
    if torch.cuda.is_available():
        # Without the argument, older GPUs that emulate bfloat16 in float32 count too.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU has it"
        return "float32", "the GPU has no bfloat16"
    if torch.accelerator.is_available():
        return "float32", "bfloat16 is chosen on CUDA and on CPUs only; ask for it with precision"
    instructions = cpu_bfloat16()
    if instructions is None:
        return "float32", "the CPU has no instructions for bfloat16"
    if hidden_size < MIN_CPU_WIDTH:
        return "float32", f"at a width of {hidden_size}, {instructions} gains nothing"
    return "bfloat16", f"the CPU has {instructions}"


def cpu_bfloat16() -> str | None:
    """Name of the instructions by which this CPU multiplies in bfloat16; None if it would emulate that.

    oneDNN accepts bfloat16 on any CPU with AVX-512, so its own answer isn't enough. Other processors than x86 were not
    measured and count as having no such instructions.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    # torch has these functions with an underscore only; a version without them counts as a CPU without the
    # instructions.
    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        supported = getattr(torch.cpu, test, None)
        if supported is not None and supported():
            return name
    return None


def set_precision(arguments: "TrainingArguments", precision: Precision) -> None:
    """Set the precision in transformers' arguments, which are made before the model; `Trainer` reads these two."""
    arguments.bf16 = precision == "bfloat16"
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
