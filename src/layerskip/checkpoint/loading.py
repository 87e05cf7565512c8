"""How a checkpoint becomes a network: the options of `layerskip.load`, and of every command that takes a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "native", "torch"]
Quantization = Literal["int8", "int4", "fp8"]
Compile = Literal["auto", "off", "max"]


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """How to load a model; `Checkpoint.load_decoder` checks it against the checkpoint and the machine."""

    dtype: DType = "auto"
    """Type of the weights; auto: float32 on a CPU, the checkpoint's own elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a CUDA GPU if there is one."""
    max_context: int | None = None
    """Longest text in tokens, prompt included; the model's own context if not given."""
    kernels: Kernels = "auto"
    """native: compiled, for float32 on a CPU; torch: all else; auto: native where it can run the model."""
    quantize: Quantization | None = None
    """Keep weights in fewer bits: less memory, more tokens/s, and another model."""
    quantize_draft: Quantization | None = None
    """The same for a copy that drafts only; the text stays that of the weights as they are."""
    draft_vocabulary: int | None = None
    """Draft among the N most frequent tokens only; the text stays the same."""
    draft_text: str | Path | None = None
    """A text that says which tokens are frequent; the tokenizer's order if not given."""
    compile: Compile = "auto"
    """Whole greedy rounds: auto: CUDA graphs on CUDA; max: torch.compile as well, also on a CPU; off: neither."""
