"""Where a network runs and in what form: the options of loading, held against the model and the machine."""

from collections.abc import Sequence
from typing import Any

import torch

from layerskip.checkpoint.loading.adapters import AdapterSet
from layerskip.errors import InvalidArgumentError
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.graphs.compiled import RoundMode, why_not_compile
from layerskip.model.native.library import COMPUTE, insist_on
from layerskip.model.native.network import why_not_native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def choose_device(device: str, local_rank: int | None = None) -> torch.device:
    """The named device, or for `auto` a CUDA GPU if there is one: that of `local_rank` where ranks share a network."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(f"device {device!r}: this machine has {torch.cuda.device_count()} usable CUDA GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    return chosen


def choose_dtype(dtype: str, device: torch.device, raw_config: dict[str, Any]) -> torch.dtype:
    """The named dtype, or for `auto` float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype == "auto":
        own = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"
        return torch.float32 if device.type == "cpu" else DTYPES.get(own, torch.float32)
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype {dtype!r} is not supported; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_kernels(
    kernels: str,
    configs: Sequence[ModelConfig],
    device: torch.device,
    dtype: torch.dtype,
    *,
    replicates: bool = False,
) -> bool:
    """Whether compiled kernels run the network: `native` insists on them, `auto` takes them where they can.

    Args:
        kernels: `auto`, `native`, `torch`, or `native:avx2` to insist on an instruction set.
        configs: The network, or the part of it that each process has.
        device: Where it runs.
        dtype: Of hidden states.
        replicates: Whether some layers are whole in every process, and others aren't.

    Raises:
        InvalidArgumentError: An unknown value, `native` where that isn't possible, or an instruction set that can't be
            used.
    """
    kind, colon, target = kernels.partition(":")
    if kind not in ("auto", "native", "torch") or (colon and (kind != "native" or not target)):
        raise InvalidArgumentError(f"kernels {kernels!r} are not known; use auto, native, native:TARGET or torch")
    obstacles = (why_not_native(config, device, dtype) for config in configs)
    obstacle = next((found for found in obstacles if found is not None), None)
    if replicates:
        obstacle = "all of its layers must have the same sizes, and replicate_layers makes some of them larger"
    if kind == "native" and obstacle is not None:
        raise InvalidArgumentError(f"kernels {kernels!r} can't run this model: {obstacle}; use auto or torch")
    if target:
        insist_on(target)
    return kind != "torch" and obstacle is None


def check_replication(num_layers: int, config: ModelConfig, adapters: AdapterSet | None) -> None:
    """Raise `InvalidArgumentError` unless the first layers can be whole in every rank.

    Args:
        num_layers: The layers that are asked for.
        config: The whole network.
        adapters: Its exit adapters; they read the values that each rank has of later layers.
    """
    if num_layers > config.num_layers:
        raise InvalidArgumentError(
            f"replicate_layers must be at most {config.num_layers}, the layers of this model, got {num_layers}"
        )
    read = [layer for adapter in (adapters.adapters if adapters else ()) for layer in adapter.value_layers]
    if num_layers and read and min(read) < num_layers:
        raise InvalidArgumentError(
            f"replicate_layers must be at most {min(read)}, since an exit adapter reads values of layer {min(read)}, "
            f"got {num_layers}"
        )


def check_compute(compute: str, *, native: bool) -> None:
    """Raise `InvalidArgumentError` unless the network can multiply so."""
    if compute not in COMPUTE:
        raise InvalidArgumentError(f"compute {compute!r} is not known; use {', '.join(COMPUTE)}")
    if compute != "float32" and not native:
        raise InvalidArgumentError(f"compute {compute!r} needs native kernels, and torch's run this model; use float32")


def choose_cache_dtype(name: str) -> torch.dtype | None:
    """The type that keys and values are kept in; None: that of hidden states. Raises `InvalidArgumentError`."""
    if name not in CACHE_DTYPES:
        raise InvalidArgumentError(f"cache_dtype {name!r} is not known; use {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name]


def choose_rounds(
    compile: str, kernels: str, config: ModelConfig, device: torch.device, *, parallel: bool = False
) -> RoundMode | None:
    """How whole rounds run.

    Rounds of models with experts can't be compiled: which experts run is known on the device only.

    Args:
        compile: `auto`: CUDA graphs on CUDA, nothing on a CPU, where native kernels are faster than what
            `torch.compile` makes; `off`; `max`: `torch.compile`, whose result is captured on CUDA.
        kernels: The kernels that were asked for.
        config: Sizes and switches.
        device: Where the network runs.
        parallel: Whether several processes share the network: their exchanges can't be part of a compiled round.

    Raises:
        InvalidArgumentError: An unknown value, or `max` where that isn't possible.
    """
    if compile not in ("auto", "off", "max"):
        raise InvalidArgumentError(f"compile {compile!r} is not known; use auto, off or max")
    if parallel:
        if compile == "max":
            raise InvalidArgumentError("compile 'max' can't be used with tensor_parallel; use auto or off")
        return None
    if compile != "max":
        return "graphs" if compile == "auto" and device.type == "cuda" and not config.sparse_layers else None
    if kernels.partition(":")[0] == "native":
        raise InvalidArgumentError("compile 'max' compiles torch's operators, and kernels 'native' has none; drop one")
    experts = "which of the model's experts run depends on the tokens" if config.sparse_layers else None
    obstacle = experts or why_not_compile(device)
    if obstacle is not None:
        raise InvalidArgumentError(f"compile 'max' can't be used here: {obstacle}; use auto or off")
    return "max"


def choose_context(config: ModelConfig, max_context: int | None) -> int:
    """Longest sequence in tokens to prepare for."""
    limit = config.max_position_embeddings
    if max_context is None:
        originals = [r.original_max_position_embeddings for r in config.ropes.values() if r.rope_type == "longrope"]
        return min([limit, *originals])
    if not 1 <= max_context <= limit:
        raise InvalidArgumentError(f"max_context {max_context} is outside 1..{limit}, the model's context in tokens")
    return max_context
