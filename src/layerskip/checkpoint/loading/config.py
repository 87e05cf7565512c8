"""The options of loading: those of `layerskip.load`, and of every command that takes a model.

Nothing here imports torch: help must come at once.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from layerskip.checks import whole_number
from layerskip.errors import InvalidArgumentError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "fp8"]
Compile = Literal["auto", "off", "max"]
Compute = Literal["float32", "int8", "bfloat16"]
CacheDType = Literal["auto", "float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """How to load a model; `plan.plan_loading` checks it against the checkpoint and the machine."""

    dtype: DType = "auto"
    """Type of the weights; auto: float32 on a CPU, the checkpoint's own elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a CUDA GPU if there is one."""
    max_context: int | None = None
    """Longest sequence in tokens, prompt included; the model's own context if not given.
    For LongRoPE models that is the context before scaling; ask for more to select the long factors."""
    kernels: str = "auto"
    """native: compiled, for float32 on a CPU; torch: all else; auto: native where it can run the model. native:avx2
    and the like insist on an instruction set, for all models of the process; layerskip info names them."""
    quantize: Quantization | None = None
    """Keep weights in fewer bits (fp8 on CUDA only): less memory, more tokens/s, and another model."""
    compute: Compute = "float32"
    """What native kernels round the inputs of products to: faster, and another model by a little, whose text doesn't
    depend on how it is decoded. int8: for weights of 4 to 8 bits; bfloat16: for weights in floats, which are rounded
    to bfloat16 too."""
    cache_dtype: CacheDType = "auto"
    """Type that keys and values are kept in; int8: with a scale for each token and head; auto: that of hidden states.
    Fewer bits take less memory and time, and make another model by a little."""
    quantize_draft: Quantization | None = None
    """The same for a copy that only drafts; the text stays that of the weights as they are."""
    draft_vocabulary: int | None = None
    """Draft among the N most frequent tokens only; the text stays the same."""
    draft_text: str | Path | None = None
    """A text file in which tokens are counted to find the most frequent; the tokenizer's order if not given."""
    exit_adapters: str | Path | None = "auto"
    """A folder with exit adapters, trained for this very model; auto: those that lie with the model; None: none."""
    tensor_parallel: int = 1
    """Processes that share the network, each with a part of every layer: all ranks of torch's process group."""
    replicate_layers: int = 0
    """With tensor_parallel: first layers that every process has whole, so that drafts at exits up to there need fewer
    exchanges; torch kernels only. They take more memory, and so do the keys and values of all layers."""
    device_memory: str | None = None
    """Memory of the device to use at most, such as 20GiB: layers beyond it stay in the CPU's memory and are copied to
    the device as they run. For models that don't fit; with torch's kernels only."""
    threads: int | None = None
    """Threads that compute on a CPU, in the whole process. If not given: those of OMP_NUM_THREADS or of the program
    that loads the model, or else one for each fast physical core that the process may use."""
    compile: Compile = "auto"
    """Whole rounds: auto: CUDA graphs on CUDA; max: torch.compile as well, also on a CPU; off: neither.
    torch.compile takes minutes for each shape, and on a CPU native kernels are faster than what it makes."""

    def __post_init__(self) -> None:
        """Check the kinds of all fields; what their values mean depends on the checkpoint and the machine.

        Raises:
            InvalidArgumentError: Naming the field and its value.
        """
        for name in ("dtype", "device", "kernels", "compile", "compute", "cache_dtype", "quantize", "quantize_draft"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name.startswith("quantize")):
                raise InvalidArgumentError(f"{name} must be a text, got {value!r}")
        object.__setattr__(self, "tensor_parallel", whole_number("tensor_parallel", self.tensor_parallel, least=1))
        object.__setattr__(self, "replicate_layers", whole_number("replicate_layers", self.replicate_layers, least=0))
        if self.replicate_layers and self.tensor_parallel == 1:
            raise InvalidArgumentError(
                f"replicate_layers {self.replicate_layers} is for tensor_parallel; give that as well, or leave it out"
            )
        if self.device_memory is not None and not isinstance(self.device_memory, str):
            raise InvalidArgumentError(f"device_memory must be a text such as '20GiB', got {self.device_memory!r}")
        if self.threads is not None:
            object.__setattr__(self, "threads", whole_number("threads", self.threads, least=1))
        for name in ("max_context", "draft_vocabulary"):
            value = getattr(self, name)
            if value is not None:  # numpy's numbers too
                object.__setattr__(self, name, whole_number(name, value, least=-(2**63)))
        if self.exit_adapters is not None and not isinstance(self.exit_adapters, str | Path):
            raise InvalidArgumentError(
                f"exit_adapters must be 'auto', the path of a folder or None, got {self.exit_adapters!r}"
            )
        if self.draft_text is not None and not isinstance(self.draft_text, str | Path):
            raise InvalidArgumentError(f"draft_text must be the path of a file, got {self.draft_text!r}")


def make_loading_config(config: LoadingConfig | None, options: dict[str, Any]) -> LoadingConfig:
    """A config from a config, keyword arguments of `layerskip.load`, or both (the arguments win).

    Raises:
        InvalidArgumentError: An argument that isn't a field, or a bad value.
    """
    names = [field.name for field in fields(LoadingConfig)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise InvalidArgumentError(f"unknown option {unknown[0]!r}; known: {', '.join(['revision', *names])}")
    if config is not None and not isinstance(config, LoadingConfig):
        raise InvalidArgumentError(f"config must be a LoadingConfig, got {type(config).__name__}")
    return replace(config or LoadingConfig(), **options)
