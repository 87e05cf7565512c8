"""Whether training computes in bfloat16: where the hardware does, and the model is wide enough for it to pay."""

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

MIN_CPU_WIDTH = 128
"""Narrowest model that a CPU trains faster in bfloat16. Measured on one core with AVX512_BF16, seconds of the processor
for a step in float32 over those in bfloat16: 0.7 at a width of 32, 1.0 at 64, 1.3 at 128, 1.4 at 192, 1.3 at 576."""
Precision = Literal["float32", "bfloat16"]


def choose_precision(asked: Literal["auto", "float32", "bfloat16"], hidden_size: int) -> tuple[Precision, str]:
    """The precision to compute in, and why, in a few words.

    Args:
        asked: What the settings say.
        hidden_size: Channels of the model.
    """
    if asked != "auto":
        return asked, "as asked"
    if torch.cuda.is_available():
        # Without the argument, older GPUs that compute it in float32 count too.
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

    oneDNN takes bfloat16 on any CPU with AVX-512, so its own answer isn't enough. CPUs that aren't x86 weren't
    measured, and count as having none.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    # Without an underscore torch offers neither; a version that has them no more is one that we know nothing about.
    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        supported = getattr(torch.cpu, test, None)
        if supported is not None and supported():
            return name
    return None


def set_precision(arguments: "TrainingArguments", precision: Precision) -> None:
    """Tell transformers' settings, which are made before the model is there; `Trainer` reads these two."""
    arguments.bf16 = precision == "bfloat16"
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
