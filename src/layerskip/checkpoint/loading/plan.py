"""The options of loading, held against a checkpoint and this machine: what will be built, decided and checked once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from layerskip.checkpoint.loading.adapters import AdapterSet
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import device_bytes, largest, loading_memory, run_bytes
from layerskip.checkpoint.loading.memory.weights import weights_of
from layerskip.checkpoint.loading.placement import (
    check_compute,
    check_replication,
    choose_cache_dtype,
    choose_context,
    choose_device,
    choose_dtype,
    choose_kernels,
    choose_rounds,
)
from layerskip.checkpoint.loading.quantization import check_quantization
from layerskip.checkpoint.loading.tensors import TensorSource, check_names
from layerskip.checkpoint.loading.vocabulary import frequent_tokens
from layerskip.checks import memory_size
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.machine import free_memory
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.graphs.compiled import RoundMode
from layerskip.model.parallel.group import RankGroup
from layerskip.model.parallel.share import Membership, shares
from layerskip.text.tokenizer import Tokenizer

NetworkKind = Literal["torch", "native"]


@dataclass(frozen=True, kw_only=True)
class DraftWeights:
    """How the weights that draft differ from those that verify."""

    quantize: str | None = None
    """Fewer bits, for a copy of the first half of the layers and of the head; None: the same layers."""
    tokens: tuple[int, ...] | None = None
    """Ids among which drafts are chosen; None: all."""


@dataclass(frozen=True, kw_only=True)
class LoadingPlan:
    """What to build of a checkpoint's tensors; `plan_loading` makes one that this machine can carry out."""

    device: torch.device
    """Where the weights go."""
    dtype: torch.dtype
    """Of the weights in memory, and of hidden states."""
    context: int
    """Longest sequence, in tokens, that will be run."""
    network: NetworkKind = "torch"
    """native: compiled kernels. torch: torch's operators."""
    rounds: RoundMode | None = None
    """How whole rounds are compiled, in a network in torch; None: not at all."""
    uses_before: int | None = None
    """Times that a round runs before it is compiled; as often as pays if not given."""
    quantize: str | None = None
    """Fewer bits for layers and head, a key of `quantization.QUANTIZATIONS`; None: `dtype`, or the file's blocks."""
    compute: str = "float32"
    """How native kernels multiply, a key of `native.library.COMPUTE`."""
    cache_dtype: torch.dtype | None = None
    """That keys and values are kept in; None: `dtype`."""
    draft: DraftWeights | None = None
    """Other weights to draft with; None: the same."""
    adapters: AdapterSet | None = None
    """Exit adapters, which were trained for this checkpoint."""
    group: RankGroup | None = None
    """The ranks that share the network; None: this process has all of it."""
    replicate_layers: int = 0
    """First layers that every rank has whole."""
    member: Membership | None = None
    """The same with the share of this rank, in a plan that `share.take_share` has made."""

    resident_layers: int | None = None
    """Layers that are on the device; the others stay in the CPU's memory. None: all."""

    @property
    def kept_dtype(self) -> torch.dtype:
        """The type that keys and values are kept in."""
        return self.cache_dtype or self.dtype

    @property
    def keeps_blocks(self) -> bool:
        """Whether weights stay in the blocks that a GGUF file has them in."""
        return self.network == "native" and self.quantize is None


class LoadableCheckpoint(Protocol):
    """What a plan depends on (`checkpoint.Checkpoint`)."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json in Hugging Face's terms."""
        ...

    @property
    def network_config(self) -> ModelConfig:
        """Sizes and switches of the network that the weights make."""
        ...

    @property
    def weights(self) -> TensorSource:
        """The tensors."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence."""
        ...

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; only asked for where the most frequent tokens of a text are wanted."""
        ...

    def find_exit_adapters(self, where: str | Path | None) -> AdapterSet | None:
        """The exit adapters in a folder, or with `auto` those that belong to the checkpoint, if there are any."""
        ...


def plan_loading(checkpoint: LoadableCheckpoint, config: LoadingConfig) -> LoadingPlan:
    """Decide how a checkpoint is loaded on this machine, and check that it fits.

    Args:
        checkpoint: What to load.
        config: What the user asks for.

    Raises:
        InvalidArgumentError: Unknown dtype or device, a context beyond the model's, kernels that can't run it, or
            rounds that can't be compiled.
        OutOfMemoryError: The weights don't fit.
        CheckpointError: The tensors aren't those of the configuration, or a file can't be read.
    """
    plan = choose_plan(checkpoint, config)
    _check_memory(checkpoint, plan)
    return plan


def choose_plan(checkpoint: LoadableCheckpoint, config: LoadingConfig) -> LoadingPlan:
    """Decide how a checkpoint is loaded, however much memory there is; raises as `plan_loading`."""
    network_config = checkpoint.network_config
    parts, group = [network_config], None
    if config.tensor_parallel > 1:
        parts = [share.config for share in shares(network_config, config.tensor_parallel)]
        group = RankGroup.of(config.tensor_parallel)
    check_names(network_config, checkpoint.weights.names())
    device = choose_device(config.device, None if group is None else group.local_rank)
    dtype = choose_dtype(config.dtype, device, checkpoint.raw_config)
    context = choose_context(network_config, config.max_context)
    limit = None if config.device_memory is None else memory_size("device_memory", config.device_memory)
    if limit is not None:
        _check_offloading(config)
    rounds = choose_rounds(config.compile, config.kernels, network_config, device, parallel=group is not None)
    native = choose_kernels(config.kernels, parts, device, dtype, replicates=config.replicate_layers > 0)
    if limit is not None:
        rounds, native = None, False
    native = native and rounds is None
    for name, value in (("quantize", config.quantize), ("quantize_draft", config.quantize_draft)):
        if value is not None:
            check_quantization(name, value, native=native, device=device, dtype=dtype)
    check_compute(config.compute, native=native)
    plan = LoadingPlan(
        device=device,
        dtype=dtype,
        context=context,
        network="native" if native else "torch",
        rounds=rounds,
        quantize=config.quantize,
        compute=config.compute,
        cache_dtype=choose_cache_dtype(config.cache_dtype),
        draft=_draft_weights(checkpoint, config),
        adapters=checkpoint.find_exit_adapters(config.exit_adapters),
        group=group,
        replicate_layers=config.replicate_layers,
    )
    check_replication(config.replicate_layers, network_config, plan.adapters)
    return plan if limit is None else _within(checkpoint, plan, limit)


def _check_offloading(config: LoadingConfig) -> None:
    """Raise `InvalidArgumentError` if options don't go together with layers in the CPU's memory."""
    if config.tensor_parallel > 1:
        raise InvalidArgumentError("device_memory and tensor_parallel can't be combined; choose one")
    wrong = {"kernels": "native", "compile": "max"}
    for name in ("kernels", "compile", "quantize", "quantize_draft"):
        value = getattr(config, name)
        kind = value if name != "kernels" else value.partition(":")[0]
        if value is not None and kind == wrong.get(name, kind):
            raise InvalidArgumentError(
                f"device_memory keeps layers in the CPU's memory as torch has them, and {name} {value!r} needs them in "
                "another form; leave one of them out"
            )


def _within(checkpoint: LoadableCheckpoint, plan: LoadingPlan, limit: int) -> LoadingPlan:
    """The plan with as many layers on the device as fit, beside a cache for one sequence of the whole context."""
    config = checkpoint.network_config
    running = run_bytes(config, plan)

    def needed(layers: int) -> int:
        resident = layers if layers < config.num_layers else None
        return device_bytes(weights_of(config, checkpoint.weights, replace(plan, resident_layers=resident))) + running

    if needed(config.num_layers) <= limit:
        return plan
    if needed(0) > limit:
        raise OutOfMemoryError(
            f"device_memory {limit / 2**30:.2f} GiB is too little for {checkpoint.name}: without any layer, embedding, "
            f"head, buffers for two layers and a cache of {plan.context} tokens need {needed(0) / 2**30:.2f} GiB; give "
            "more, or a smaller max_context"
        )
    return replace(plan, resident_layers=largest(lambda layers: needed(layers) <= limit, config.num_layers - 1))


def _draft_weights(checkpoint: LoadableCheckpoint, config: LoadingConfig) -> DraftWeights | None:
    """Weights that only draft; None where drafts come from the network's own."""
    tokens = None
    if config.draft_vocabulary is not None:
        tokens = _draft_tokens(checkpoint, config.draft_vocabulary, config.draft_text)
    elif config.draft_text is not None:
        raise InvalidArgumentError("draft_text ranks tokens for draft_vocabulary; give that as well")
    if config.quantize_draft is None and tokens is None:
        return None
    return DraftWeights(quantize=config.quantize_draft, tokens=tokens)


def _draft_tokens(checkpoint: LoadableCheckpoint, count: int, text: str | Path | None) -> tuple[int, ...]:
    """The tokens that drafts may be: those that end a sequence, then the most frequent ones."""
    size = checkpoint.network_config.vocab_size
    if not 1 <= count <= size:
        raise InvalidArgumentError(f"draft_vocabulary must be from 1 to the vocabulary's {size}, got {count}")
    token_ids: list[int] = []
    if text is not None:
        try:
            content = Path(text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"draft_text {str(text)!r} can't be read: {error}") from error
        token_ids = checkpoint.text_tokenizer.encode(content, add_special_tokens=False)
    return frequent_tokens(token_ids, count, size, checkpoint.eos_token_ids)


def _check_memory(checkpoint: LoadableCheckpoint, plan: LoadingPlan) -> None:
    """Raise `OutOfMemoryError` unless loading fits into what is free."""
    free = free_memory(plan.device)
    if free is None:
        return
    config = checkpoint.network_config
    if plan.group is not None:
        config = shares(config, plan.group.size)[plan.group.rank].config
    needed = loading_memory(weights_of(config, checkpoint.weights, plan)).peak
    if needed > free:
        raise OutOfMemoryError(
            f"{checkpoint.name} needs {needed / 2**30:.2f} GiB in {plan.dtype} and {free / 2**30:.2f} GiB are free on "
            f"{plan.device}; use a 16-bit dtype, a smaller model or another device"
        )
