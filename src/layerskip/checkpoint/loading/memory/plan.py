"""What a model needs of a device's memory, and what fits, from headers alone.

Loading compares it with what is free (`loading.plan`); `layerskip inspect --memory` prints it; `benchmarks/memory.py`
compares it with what processes were measured to need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layerskip.checkpoint.loading.memory.running import CHUNK, cache_bytes, working_bytes
from layerskip.checkpoint.loading.memory.weights import HOST_PART, PlannedNetwork, WeightBytes, weights_of
from layerskip.checkpoint.loading.tensors import TensorSource
from layerskip.errors import InvalidArgumentError
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.parallel.share import shares

RANKS = (1, 2, 4, 8)
"""Numbers of processes that share the weights, for which memory is planned."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """One of several processes that share the weights by tensor parallelism."""

    ranks: int
    weights: int
    """Bytes that stay."""
    peak: int
    """Bytes at the worst moment of loading."""
    cache_per_token: int
    """Bytes of the cache for a token of a sequence."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a model on one device."""

    parts: tuple[WeightBytes, ...]
    """Its weights, by part and format."""
    weights: int
    """Bytes that stay in memory as long as the model is loaded; mapped files aren't counted."""
    mapped: int
    """Bytes of files that stay mapped: the system keeps what is used, as far as there is room."""
    peak: int
    """Bytes at the worst moment of loading."""
    batch_size: int
    """Sequences at a time."""
    context: int
    """Tokens of a sequence."""
    cache_per_token: int
    """Bytes of the cache for a token of a sequence."""
    cache: int
    """Bytes of the cache for a full context of one sequence."""
    batch_cache: int
    """The same for the batch."""
    working: int
    """Bytes of hidden states, masks and logits while the batch's prompts are read."""
    needed: int
    """Bytes for all of it: weights, the batch's cache and work, or the peak of loading if that is more."""
    free: int | None
    """Bytes that are free on the device; None where the system doesn't report them."""
    largest_batch: int | None
    """Sequences of a full context that fit; None where nothing is known of the device's memory."""
    longest_context: int | None
    """Tokens of a single sequence that fit, up to the context."""
    ranks: tuple[RankMemory, ...] = ()
    """For several processes that share the weights: the one that needs the most."""


@dataclass(frozen=True, kw_only=True)
class LoadingMemory:
    """Bytes of weights."""

    kept: int
    """That stay."""
    mapped: int
    """Of files that stay mapped."""
    peak: int
    """At the worst moment of loading."""


def loading_memory(weights: Sequence[WeightBytes]) -> LoadingMemory:
    """Add up weights in the order in which they are loaded."""
    kept = mapped = peak = 0
    for weight in weights:
        kept, mapped = kept + weight.kept, mapped + weight.mapped
        peak = max(peak, kept + weight.passing)
    return LoadingMemory(kept=kept, mapped=mapped, peak=peak)


def plan_memory(
    config: ModelConfig,
    source: TensorSource,
    plan: PlannedNetwork,
    *,
    chunk: int,
    batch_size: int = 1,
    free: int | None = None,
) -> MemoryPlan:
    """What a model needs; no tensor is read.

    Args:
        config: Sizes and switches of the network that the weights make.
        source: The checkpoint's tensors.
        plan: How they would be loaded.
        chunk: Tokens of a prompt that are read at once.
        batch_size: B.
        free: Bytes that are free on the device.
    """
    config = with_adapters(config, plan)
    weights = weights_of(config, source, plan)
    memory = loading_memory(weights)

    def needed(rows: int, tokens: int) -> int:
        running = cache_bytes(config, plan.kept_dtype, rows, tokens) + working(rows, tokens)
        return max(memory.peak, memory.kept + running)

    def working(rows: int, tokens: int) -> int:
        native = plan.network == "native"
        return working_bytes(config, plan.dtype, native=native, rows=rows, chunk=min(chunk, tokens), tokens=tokens)

    context = plan.context
    return MemoryPlan(
        parts=grouped(weights),
        weights=memory.kept,
        mapped=memory.mapped,
        peak=memory.peak,
        batch_size=batch_size,
        context=context,
        cache_per_token=cache_bytes(config, plan.kept_dtype, 1, 1) // 2,
        cache=cache_bytes(config, plan.kept_dtype, 1, context),
        batch_cache=cache_bytes(config, plan.kept_dtype, batch_size, context),
        working=working(batch_size, context),
        needed=needed(batch_size, context),
        free=free,
        largest_batch=None if free is None else largest(lambda rows: needed(rows, context) <= free),
        longest_context=None if free is None else largest(lambda tokens: needed(1, tokens) <= free, context),
        ranks=plan_ranks(config, source, plan),
    )


def device_bytes(weights: Sequence[WeightBytes]) -> int:
    """Bytes of weights on the device, where some layers stay in the CPU's memory."""
    return sum(weight.kept for weight in weights if weight.part != HOST_PART)


def run_bytes(config: ModelConfig, plan: PlannedNetwork) -> int:
    """Bytes of the cache for one sequence of the whole context, and of reading it."""
    config, context = with_adapters(config, plan), plan.context
    chunk, native = min(CHUNK, context), plan.network == "native"
    work = working_bytes(config, plan.dtype, native=native, rows=1, chunk=chunk, tokens=context)
    return cache_bytes(config, plan.kept_dtype, 1, context) + work


def with_adapters(config: ModelConfig, plan: PlannedNetwork) -> ModelConfig:
    """The configuration with the plan's exit adapters, which have keys and values of their own."""
    if plan.adapters is None:
        return config
    return replace(config, adapted_exits=tuple(sorted(adapter.exit_layer for adapter in plan.adapters.adapters)))


def plan_ranks(config: ModelConfig, source: TensorSource, plan: PlannedNetwork) -> tuple[RankMemory, ...]:
    """Memory of one of several processes, for numbers of them into which the network can be cut."""
    found = []
    for ranks in RANKS:
        try:
            found.append(plan_rank(config, source, plan, ranks))
        except InvalidArgumentError:
            continue
    return tuple(found)


def plan_rank(config: ModelConfig, source: TensorSource, plan: PlannedNetwork, ranks: int) -> RankMemory:
    """The process that needs the most of several; raises as `shares`."""
    parts = [share.config for share in shares(config, ranks)]
    memories = [loading_memory(weights_of(part, source, plan)) for part in parts]
    return RankMemory(
        ranks=ranks,
        weights=max(memory.kept for memory in memories),
        peak=max(memory.peak for memory in memories),
        cache_per_token=max(cache_bytes(part, plan.kept_dtype, 1, 1) // 2 for part in parts),
    )


def grouped(weights: Sequence[WeightBytes]) -> tuple[WeightBytes, ...]:
    """Weights of the same part and format as one, in the order of their first."""
    groups: dict[tuple[str, str], WeightBytes] = {}
    for weight in weights:
        before = groups.get((weight.part, weight.format), replace(weight, kept=0, mapped=0, passing=0))
        groups[weight.part, weight.format] = replace(
            before,
            kept=before.kept + weight.kept,
            mapped=before.mapped + weight.mapped,
            passing=max(before.passing, weight.passing),
        )
    return tuple(groups.values())


def largest(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest number up to a limit that fits; 0 if not even 1 does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
