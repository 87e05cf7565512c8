"""Bytes of a network's weights in memory, in the order in which they are loaded, from files' headers alone.

The rules are those of `loading.network` and `loading.builders`: what is copied, in which format, and what lives beside
it while it is made.

Shapes: O output width, I input width, D width, V vocabulary, N tokens among which drafts are chosen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

from layerskip.checkpoint.loading.adapters import AdapterDescription, AdapterSet
from layerskip.checkpoint.loading.quantization import native_storage, quantized_bytes
from layerskip.checkpoint.loading.tensors import (
    EMBEDDING,
    HEAD,
    SLICE_BYTES,
    StoredTensor,
    TensorSource,
    expert_weights,
    has_bias,
    kept_formats,
    stored_shapes,
    stored_weights,
)
from layerskip.model.blocks import BlockFormat, block_bytes
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.native.library import PANEL
from layerskip.model.native.linear import packed_bytes, padded_outputs
from layerskip.model.positions import DISTANCES
from layerskip.model.rope import rope_bytes
from layerskip.model.torch.linear import packs

FLOAT_BYTES = 4
HOST_PART = "layers in the CPU's memory"
"""Part of the weights that is not on the device; only counted where the device is the CPU."""


class PlannedWeights(Protocol):
    """What a plan says of draft weights (`plan.DraftWeights`)."""

    @property
    def quantize(self) -> str | None:
        """Fewer bits, for a copy of the first half of the layers and of the head."""
        ...

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """Ids among which drafts are chosen."""
        ...


class PlannedNetwork(Protocol):
    """The part of a `plan.LoadingPlan` on which memory depends."""

    @property
    def device(self) -> torch.device:
        """Where the weights go."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that aren't in blocks, and of hidden states."""
        ...

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of keys and values."""
        ...

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def network(self) -> str:
        """`native` or `torch`."""
        ...

    @property
    def rounds(self) -> str | None:
        """How whole rounds are compiled."""
        ...

    @property
    def quantize(self) -> str | None:
        """Fewer bits for layers and head."""
        ...

    @property
    def compute(self) -> str:
        """What inputs of products are rounded to."""
        ...

    @property
    def draft(self) -> PlannedWeights | None:
        """Other weights to draft with."""
        ...

    @property
    def resident_layers(self) -> int | None:
        """Layers on the device; the others stay in the CPU's memory."""
        ...

    @property
    def adapters(self) -> AdapterSet | None:
        """Exit adapters."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """One weight, or several."""

    part: str
    """Which: embedding, head, layers, norms, draft layers, draft head, exit adapters, rotary tables."""
    format: str
    """How it is kept, such as bfloat16, int8 or q4_0."""
    kept: int
    """Bytes of memory that it takes as long as the model is loaded."""
    mapped: int = 0
    """Bytes that stay in the file, of which the system reads what is used and drops what it needs room for."""
    passing: int = 0
    """Bytes that are needed beside `kept` while it is loaded."""


def weights_of(config: ModelConfig, source: TensorSource, plan: PlannedNetwork) -> list[WeightBytes]:
    """All weights of a network, in the order in which they are loaded.

    Args:
        config: Sizes and switches; those of one rank, where several share the weights.
        source: The checkpoint's tensors, of which headers are read only.
        plan: How they are loaded.
    """
    own = _Weights(config, source, plan, plan.quantize)
    items = [*own.tables()]
    if plan.adapters is not None:
        items += _adapters(config, plan, plan.adapters)
    for index in range(config.num_layers if plan.resident_layers is None else plan.resident_layers):
        items += own.layer(f"model.layers.{index}", "layers")
    if plan.resident_layers is not None:
        items += _offloaded(own, config, plan, plan.resident_layers)
    items.append(WeightBytes(part="norms", format="float32", kept=config.hidden_size * FLOAT_BYTES))
    items += _ropes(config, plan)
    if plan.draft is not None:
        items += _drafts(config, source, plan, plan.draft)
    for adapter in () if plan.adapters is None else plan.adapters.adapters:
        if adapter.vocabulary_size is not None:
            bits = _Weights(config, source, plan, _adapter_bits(plan))
            items.append(bits.head("exit adapters", adapter.vocabulary_size))
    return items


def _offloaded(own: "_Weights", config: ModelConfig, plan: PlannedNetwork, first: int) -> Iterator[WeightBytes]:
    """Layers in the CPU's memory, from layer `first` on, and two buffers on the device."""
    layer = [item for item in own.layer(f"model.layers.{first}", "layers") if item.part == "layers"]
    size = sum(item.kept for item in layer)
    on_host = (config.num_layers - first) * size
    form = _name(plan.dtype)
    yield WeightBytes(part="layer buffers", format=form, kept=2 * size)
    yield WeightBytes(part=HOST_PART, format=form, kept=on_host if plan.device.type == "cpu" else 0)


def _drafts(
    config: ModelConfig, source: TensorSource, plan: PlannedNetwork, draft: PlannedWeights
) -> Iterator[WeightBytes]:
    """The copy that drafts: the first half of the layers where it has fewer bits, and a head."""
    weights = _Weights(config, source, plan, draft.quantize or plan.quantize)
    for index in range(max(1, config.num_layers // 2) if draft.quantize is not None else 0):
        yield from weights.layer(f"model.layers.{index}", "draft layers")
    yield weights.head("draft head", None if draft.tokens is None else len(draft.tokens))


def _adapters(config: ModelConfig, plan: PlannedNetwork, adapters: AdapterSet) -> Iterator[WeightBytes]:
    """Layer, projections and norm of each exit adapter; its head is another weight of the model."""
    assert adapters.weights is not None
    weights = _Weights(config, adapters.weights, plan, _adapter_bits(plan))
    for adapter in adapters.adapters:
        yield from weights.adapter(adapter)


def _adapter_bits(plan: PlannedNetwork) -> str | None:
    asked = None if plan.draft is None else plan.draft.quantize
    return asked or plan.quantize or ("int8" if plan.network == "native" else None)


def _ropes(config: ModelConfig, plan: PlannedNetwork) -> Iterator[WeightBytes]:
    """Cosines and sines of all positions, computed in float32."""
    for kind, rope in config.ropes.items():
        if kind in config.layer_types:
            computed = rope_bytes(rope, plan.context, torch.float32)
            yield WeightBytes(
                part="rotary tables",
                format=_name(plan.dtype),
                kept=rope_bytes(rope, plan.context, plan.dtype),
                passing=computed if plan.device.type == "cpu" else 0,
            )


class _Weights:
    """Bytes of one checkpoint's weights in one number of bits."""

    def __init__(self, config: ModelConfig, source: TensorSource, plan: PlannedNetwork, quantize: str | None) -> None:
        self._config, self._source, self._plan, self._quantize = config, source, plan, quantize
        self._native, self._on_cpu = plan.network == "native", plan.device.type == "cpu"

    def tables(self) -> Iterator[WeightBytes]:
        """Embedding table and head."""
        config, dtype = self._config, self._plan.dtype
        rows, width = config.vocab_size, config.hidden_size
        head = self.head("head", None)
        table = replace(self._source.stored(EMBEDDING), shape=(rows, width))
        shape = (rows, width)
        blocks = self._formats("head", [self._head_name], [shape]) if self._native else None
        embedding = WeightBytes(part="embedding", format=_name(dtype), kept=rows * width * dtype.itemsize)
        if config.tie_word_embeddings and blocks is None and not self._copies(width):
            yield replace(embedding, part="embedding, head", passing=self._reading([table]))
            return
        yield head
        if not self._on_cpu or (blocks is None and not self._copies(width)):
            yield replace(embedding, passing=self._reading([table]))
            return
        kept_as = self._source.block_format(EMBEDDING)
        if table.mapped:
            yield WeightBytes(part="embedding", format=_name(table.dtype), kept=0, mapped=_bytes_in_file(table))
        elif kept_as is not None and (table.blocks_mapped or blocks is not None):
            num_bytes = block_bytes(kept_as, rows, width)
            mapped = table.blocks_mapped
            yield WeightBytes(
                part="embedding", format=kept_as, kept=0 if mapped else num_bytes, mapped=num_bytes if mapped else 0
            )
        else:
            yield replace(embedding, passing=_computing(table))

    def head(self, part: str, tokens: int | None) -> WeightBytes:
        """The head, or one of N tokens."""
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        item = self._linear(part, "head", [self._head_name], [shape])
        if tokens is None:
            return item
        one = self._linear(part, "head", [self._head_name], [(tokens, config.hidden_size)])
        return replace(one, passing=item.passing + one.passing)

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self._config.tie_word_embeddings else HEAD

    def layer(self, prefix: str, part: str) -> Iterator[WeightBytes]:
        """All weights of a layer."""
        sparse = prefix in {f"model.layers.{index}" for index in self._config.sparse_layers}
        for ours, theirs in stored_weights(self._config, sparse=sparse).items():
            shapes = stored_shapes(self._config, ours, len(theirs))
            if len(shapes[0]) == 1:
                yield WeightBytes(part="norms", format="float32", kept=shapes[0][0] * FLOAT_BYTES)
                continue
            yield self._linear(part, ours, [f"{prefix}.{name}.weight" for name in theirs], shapes)
            if has_bias(self._config, ours):
                yield WeightBytes(part=part, format=_name(self._plan.dtype), kept=self._bias_bytes(ours, shapes))

        for number in range(self._config.num_experts if sparse else 0):
            for ours, theirs in expert_weights(self._config, number).items():
                shapes = stored_shapes(self._config, ours, len(theirs), expert=True)
                yield self._linear(part, ours, [f"{prefix}.{name}.weight" for name in theirs], shapes)

    def adapter(self, adapter: AdapterDescription) -> Iterator[WeightBytes]:
        """An exit adapter's own weights."""
        config, part, start = self._config, "exit adapters", f"exit_{adapter.exit_layer}"
        width = config.hidden_size
        yield from (replace(item, part=part) for item in self.layer(f"{start}.layer", part))
        yield self._linear(part, "input", [f"{start}.input_proj.weight"], [(width, width)])
        yield WeightBytes(part=part, format="float32", kept=width * FLOAT_BYTES)
        if adapter.value_layers:
            inputs = len(adapter.value_layers) * config.num_key_value_heads * config.head_dim
            yield self._linear(part, "values", [f"{start}.value_proj.weight"], [(width, inputs)])
            yield WeightBytes(part=part, format=_name(self._plan.dtype), kept=DISTANCES * width * FLOAT_BYTES)

    def _linear(self, part: str, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> WeightBytes:
        """One matrix, which the checkpoint may have in several tensors."""
        stored = [replace(self._source.stored(name), shape=shape) for name, shape in zip(names, shapes, strict=True)]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        if not self._native:
            return self._torch_linear(part, outputs, inputs, stored, None if ours == "router" else self._quantize)
        blocks = self._formats(ours, names, shapes)
        if blocks is not None:
            return _in_blocks(part, ours, blocks, stored)
        quantize = None if ours == "router" else self._quantize
        compute = "float32" if ours == "router" else self._plan.compute
        storage = native_storage(quantize, inputs, compute) or _exact_storage(stored)
        passing = 0
        if ours == "down":
            passing += outputs * inputs * FLOAT_BYTES if inputs % PANEL else 0
            inputs = -(-inputs // PANEL) * PANEL
        step = 2 if ours == "gate_up" else 1
        kept = packed_bytes(outputs // step, inputs, storage, step=step)
        passing += self._passing(stored, torch.float32, kept)
        return WeightBytes(part=part, format=storage, kept=kept, passing=passing)

    def _passing(self, stored: Sequence[StoredTensor], dtype: torch.dtype, kept: int, work: int = 0) -> int:
        """Bytes beside a weight that is copied: its numbers in one piece, while they are read and while it is made.

        Args:
            stored: The checkpoint's tensors.
            dtype: Of the numbers.
            kept: Bytes of the copy.
            work: Bytes of what it is made through, which is gone when the copy is there.
        """
        reading = self._reading(stored)
        if len(stored) == 1 and stored[0].mapped and stored[0].dtype == dtype:  # made from the file itself
            return reading + max(work - kept, 0)
        numbers = sum(prod(tensor.shape) for tensor in stored) * dtype.itemsize
        return numbers + max(reading - kept, work - kept, 0)

    def _torch_linear(
        self, part: str, outputs: int, inputs: int, stored: Sequence[StoredTensor], quantize: str | None
    ) -> WeightBytes:
        dtype = self._plan.dtype
        copy = outputs * inputs * dtype.itemsize
        if quantize is None:
            passing = self._passing(stored, dtype, copy) if self._copies(inputs) else self._reading(stored)
            return WeightBytes(part=part, format=_name(dtype), kept=copy, passing=passing)
        kept = quantized_bytes(quantize, outputs, inputs, dtype)
        work = 2 * copy  # scaled numbers, then rounded ones
        return WeightBytes(part=part, format=quantize, kept=kept, passing=self._passing(stored, dtype, kept, work))

    def _copies(self, inputs: int) -> bool:
        """Whether a matrix is copied into another layout (`builders.NetworkBuilder.copies`)."""
        plan = self._plan
        return (
            self._native
            or self._quantize is not None
            or (plan.rounds != "max" and packs(plan.device, plan.dtype, inputs))
        )

    def _formats(
        self, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[BlockFormat, ...] | None:
        """The blocks that a weight's tensors keep; as `network._Loader._blocks`."""
        if not self._native or self._quantize is not None:
            return None
        return kept_formats(self._source, ours, names, shapes)

    def _reading(self, stored: Sequence[StoredTensor]) -> int:
        """Bytes of the file's pages, or of what is computed from them, while tensors are copied one after the other."""
        if not self._on_cpu:  # the host's, not the device's
            return 0
        return max(_bytes_in_file(tensor) if tensor.mapped else _computing(tensor) for tensor in stored)

    def _bias_bytes(self, ours: str, shapes: Sequence[tuple[int, ...]]) -> int:
        outputs = sum(shape[0] for shape in shapes)
        if not self._native:
            return outputs * self._plan.dtype.itemsize
        halves = 2 if ours == "gate_up" else 1
        return padded_outputs(outputs // halves, halves) * FLOAT_BYTES


def _in_blocks(part: str, ours: str, formats: Sequence[BlockFormat], stored: Sequence[StoredTensor]) -> WeightBytes:
    """A matrix of tensors in blocks, as `NativeBuilder.linear` lays it out."""
    outputs, inputs = [tensor.shape[0] for tensor in stored], stored[0].shape[1]
    passing = sum(block_bytes(kind, *tensor.shape) for kind, tensor in zip(formats, stored, strict=True))
    copied = len(stored) > 1 and ours != "gate_up"  # one below the other
    passing *= 2 if copied or not all(tensor.blocks_mapped for tensor in stored) else 1
    if len(set(formats)) > 1:
        kept = sum(packed_bytes(count, inputs, kind) for count, kind in zip(outputs, formats, strict=True))
        return WeightBytes(part=part, format="+".join(dict.fromkeys(formats)), kept=kept, passing=passing)
    step = 2 if ours == "gate_up" else 1
    kept = packed_bytes(sum(outputs) // step, inputs, formats[0], step=step)
    return WeightBytes(part=part, format=formats[0], kept=kept, passing=passing)


def _bytes_in_file(tensor: StoredTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _computing(tensor: StoredTensor) -> int:
    """Bytes that turning a file's blocks into numbers takes, a slice at a time, with what the heap keeps meanwhile."""
    return min(tensor.num_bytes + 3 * _bytes_in_file(tensor), 8 * SLICE_BYTES)


def _exact_storage(stored: Sequence[StoredTensor]) -> str:
    """The smallest format that holds numbers of these types, whatever they are; float32 may turn out to be smaller."""
    dtypes = {tensor.dtype for tensor in stored}
    return _name(next(iter(dtypes))) if len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16} else "float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
