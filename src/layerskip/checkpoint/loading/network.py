"""From a checkpoint's tensors to a `Decoder`, one weight copied at a time.

Shapes: O output width, I input width, D width, V vocabulary, N tokens among which drafts are chosen.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from layerskip.checkpoint.loading.adapters import AdapterDescription, AdapterSet, read_token_ids, tensor_name
from layerskip.checkpoint.loading.builders import (
    HostBuilder,
    NativeBuilder,
    NetworkBuilder,
    SharedWeights,
    TorchBuilder,
)
from layerskip.checkpoint.loading.plan import DraftWeights, LoadingPlan
from layerskip.checkpoint.loading.share import take_share
from layerskip.checkpoint.loading.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    TensorSource,
    check_shape,
    expert_weights,
    fill,
    has_bias,
    kept_formats,
    read_table,
    read_tensor,
    stored_shapes,
    stored_weights,
)
from layerskip.errors import InvalidArgumentError
from layerskip.model.blocks import BlockWeight
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder
from layerskip.model.native.memory import map_private, return_freed_memory
from layerskip.model.positions import DISTANCES
from layerskip.model.primitives import LayerCalls
from layerskip.model.rope import RopeTable
from layerskip.model.torch.experts import Expert, Experts
from layerskip.model.torch.fusion import Fusion
from layerskip.model.torch.linear import AnyLinear, Linear
from layerskip.model.torch.network import LayerWeights
from layerskip.model.torch.offload import OffloadedLayers

logger = logging.getLogger(__name__)
MATRICES = ("qkv", "o", "gate_up", "down", "router")
NORMS = ("attention_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")


def load_decoder(config: ModelConfig, source: TensorSource, plan: LoadingPlan) -> Decoder:
    """Build the network, copying one weight at a time.

    The embedding table of a network whose head is packed stays memory-mapped in the file's dtype, so that a tied
    table isn't held twice. On a CPU the peak is the network's own size and one copy of its largest weight.

    Args:
        config: Sizes and switches.
        source: The checkpoint's tensors, whose names have passed `tensors.check_names`.
        plan: What to build.

    Raises:
        WeightsError: A tensor is of the wrong shape or type.
        InvalidArgumentError: No weight is in a format whose products can be computed as planned.
    """
    if plan.adapters is not None:
        exits = sorted(adapter.exit_layer for adapter in plan.adapters.adapters)
        config = replace(config, adapted_exits=tuple(exits))
    try:
        return _load(config, source, plan)
    finally:
        return_freed_memory()


COMPUTE_NEEDS = {
    "int8": "weights in 8 or 4 bits and this checkpoint has none; give quantize int8 or int4 too, or a GGUF file in "
    "8 bits or fewer",
    "bfloat16": "weights in floats and these have 8 or 4 bits; use int8, or a checkpoint that isn't quantized",
}
"""What weights must be for the products that are asked for, and what to do if they are not."""


def _load(config: ModelConfig, source: TensorSource, plan: LoadingPlan) -> Decoder:
    if plan.group is not None:
        config, source, plan = take_share(config, source, plan)
    if plan.network == "native":
        decoder = _Loader(config, source, NativeBuilder.of(plan)).load(plan)
        if plan.compute != "float32" and decoder.compute != plan.compute:
            raise InvalidArgumentError(f"compute {plan.compute!r} needs {COMPUTE_NEEDS[plan.compute]}")
        return decoder
    if plan.resident_layers is not None:
        return _OffloadingLoader(config, source, TorchBuilder.of(plan)).load(plan)
    return _Loader(config, source, TorchBuilder.of(plan)).load(plan)


@dataclass(frozen=True, kw_only=True)
class _Adapter(Generic[AnyLinear]):
    """An exit adapter's weights."""

    exit_layer: int
    layer: LayerWeights[AnyLinear]
    norm: Tensor
    """[D]."""
    tokens: Tensor | None
    """[N] ids that it can draft; None: all."""


class _Loader(Generic[AnyLinear]):
    """Reads one checkpoint's tensors for one kind of network."""

    def __init__(self, config: ModelConfig, source: TensorSource, builder: NetworkBuilder[AnyLinear]) -> None:
        self._config = config
        self._source = source
        self._builder = builder
        self._idle: dict[str, AnyLinear] = {}
        """Matrices of heads that another rank has: one for all layers, since their results aren't used."""

    def load(self, plan: LoadingPlan) -> Decoder:
        """The network, and the one that drafts for it if the plan has one."""
        config = self._config
        embedding, head = self._tables()
        adapters = [] if plan.adapters is None else self._read_adapters(plan.adapters, plan)
        layers = self._layers(plan, [adapter.layer for adapter in adapters])
        shared = SharedWeights(
            config=config,
            embedding=embedding,
            final_norm=self._head_norm(FINAL_NORM),
            ropes={
                kind: RopeTable(rope, plan.context, plan.dtype, plan.device)
                for kind, rope in config.ropes.items()
                if kind in config.layer_types
            },
        )
        decoder = self._decoder(shared, layers, head, plan)
        drafting: Sequence[LayerWeights[AnyLinear]] = layers
        if plan.draft is not None:
            drafting = self._set_drafter(decoder, shared, layers, plan, plan.draft)
        for adapter in adapters:
            self._set_adapter(decoder, shared, layers, drafting, head, plan, adapter)
        return decoder

    def _layers(self, plan: LoadingPlan, others: list[LayerWeights[AnyLinear]]) -> Sequence[LayerWeights[AnyLinear]]:
        """All layers, and others (of exit adapters) behind them."""
        return [*map(self._numbered_layer, range(self._config.num_layers)), *others]

    def _read_adapters(self, adapters: AdapterSet, plan: LoadingPlan) -> list[_Adapter[AnyLinear]]:
        """The weights of all exit adapters, in the bits of drafts."""
        builder = self._builder.for_drafts(self._adapter_bits(plan))
        assert adapters.weights is not None
        loader = _Loader(self._config, adapters.weights, builder)
        ascending = sorted(adapters.adapters, key=lambda adapter: adapter.exit_layer)
        return [loader._read_adapter(adapter) for adapter in ascending]

    def _adapter_bits(self, plan: LoadingPlan) -> str | None:
        """How adapters are quantized: as drafts are, or else as suits the network, since they do nothing but draft."""
        asked = None if plan.draft is None else plan.draft.quantize
        return asked or plan.quantize or self._builder.adapter_bits

    def _read_adapter(self, adapter: AdapterDescription) -> _Adapter[AnyLinear]:
        """One exit adapter's weights; the loader's tensors are those of the adapters."""
        width, exit_layer = self._config.hidden_size, adapter.exit_layer
        layer = self._layer(tensor_name(exit_layer, "layer"))
        projection = self._linear("input", [tensor_name(exit_layer, "input_proj")], [(width, width)])
        tokens = read_token_ids(self._source, adapter, self._config.vocab_size)
        return _Adapter(
            exit_layer=exit_layer,
            layer=replace(layer, input=projection, fusion=self._fusion(adapter)),
            norm=self._head_norm(tensor_name(exit_layer, "norm.weight")),
            tokens=None if tokens is None else tokens.to(self._builder.device),
        )

    def _fusion(self, adapter: AdapterDescription) -> Fusion[AnyLinear] | None:
        """The weights with which an adapter reads values of later layers, if it does."""
        if not adapter.value_layers:
            return None
        config, exit_layer = self._config, adapter.exit_layer
        inputs = len(adapter.value_layers) * config.num_key_value_heads * config.head_dim
        width = config.hidden_size
        return Fusion(
            layers=adapter.value_layers,
            values=self._linear("values", [tensor_name(exit_layer, "value_proj")], [(width, inputs)]),
            distances=read_tensor(self._source, tensor_name(exit_layer, "distances"), (DISTANCES, width)).to(
                self._builder.device, self._builder.dtype
            ),
        )

    def _set_adapter(
        self,
        decoder: Decoder,
        shared: SharedWeights,
        layers: Sequence[LayerWeights[AnyLinear]],
        drafting: Sequence[LayerWeights[AnyLinear]],
        head: AnyLinear,
        plan: LoadingPlan,
        adapter: _Adapter[AnyLinear],
    ) -> None:
        """Give an exit of the decoder its adapter; `drafting`: the layers that draft, the same or of fewer bits."""
        own = replace(shared, final_norm=adapter.norm)
        if adapter.tokens is not None:
            builder = self._builder.for_drafts(self._adapter_bits(plan))
            head = _Loader(self._config, self._source, builder)._draft_head(adapter.tokens)
        index = self._config.adapter_at(adapter.exit_layer)
        loader = _Loader(self._config, self._source, self._builder.for_drafts(None))
        adapted, quantized = (
            loader._decoder(own, weights, head, plan, adapter.tokens, decoder.calls, index)
            for weights in (layers, drafting)
        )
        decoder.set_adapter(adapter.exit_layer, adapted, None if drafting is layers else quantized)

    def _set_drafter(
        self,
        decoder: Decoder,
        shared: SharedWeights,
        layers: Sequence[LayerWeights[AnyLinear]],
        plan: LoadingPlan,
        draft: DraftWeights,
    ) -> Sequence[LayerWeights[AnyLinear]]:
        """Let a network with other weights draft for the decoder; returns the layers with which adapters draft."""
        builder = self._builder.for_drafts(draft.quantize or plan.quantize)
        loader = _Loader(self._config, self._source, builder)
        drafting, num_layers = layers, self._config.num_layers
        if draft.quantize is not None:
            num_layers = max(1, self._config.num_layers // 2)
            first = [loader._numbered_layer(index) for index in range(num_layers)]
            drafting = [*first, *layers[num_layers:]]
        tokens = None if draft.tokens is None else torch.tensor(draft.tokens, device=plan.device)
        drafter = loader._decoder(shared, drafting, loader._draft_head(tokens), plan, tokens, decoder.calls)
        decoder.set_drafter(drafter, num_layers=num_layers, shares_states=draft.quantize is None)
        return drafting

    def _decoder(
        self,
        shared: SharedWeights,
        layers: Sequence[LayerWeights[AnyLinear]],
        head: AnyLinear,
        plan: LoadingPlan,
        tokens: Tensor | None = None,
        calls: LayerCalls | None = None,
        adapter: int | None = None,
    ) -> Decoder:
        """A decoder with these layers and this head."""
        return self._builder.decoder(
            shared,
            layers,
            head,
            embedding=shared.embedding,
            ropes=shared.ropes,
            dtype=plan.dtype,
            device=plan.device,
            max_context=plan.context,
            cache_dtype=plan.cache_dtype,
            token_ids=tokens,
            adapter=adapter,
            calls=calls,
        )

    def _tables(self) -> tuple[Tensor | BlockWeight, AnyLinear]:
        """Embedding table and head. They come before the layers: their copies are the largest."""
        builder, source, tied = self._builder, self._source, self._config.tie_word_embeddings
        shape = self._table_shape
        blocks = self._blocks([self._head_name], [shape])
        if blocks is not None:
            table = self._blocks([EMBEDDING], [shape])
            return read_table(source, shape, builder.dtype) if table is None else table[0], builder.linear(
                "head", blocks
            )
        copied = builder.copies(shape[1])
        if tied and not copied:
            embedding = self._stack([EMBEDDING], [shape])
            return embedding, builder.linear("head", embedding)
        head = builder.linear("head", self._stack([self._head_name], [shape]))
        if copied and builder.device.type == "cpu":  # mapped anew, without the pages that the head was copied from
            return read_table(source, shape, builder.dtype), head
        return self._stack([EMBEDDING], [shape]), head

    def _draft_head(self, tokens: Tensor | None) -> AnyLinear:
        """The head with the outputs that drafts are chosen among."""
        blocks = self._blocks([self._head_name], [self._table_shape])
        if blocks is not None:
            chosen = blocks if tokens is None else (blocks[0].rows(tokens),)
            return self._builder.linear("head", chosen)
        weight = self._stack([self._head_name], [self._table_shape])
        return self._builder.linear("head", weight if tokens is None else weight[tokens.to(weight.device)])

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self._config.tie_word_embeddings else HEAD

    @property
    def _table_shape(self) -> tuple[int, int]:
        return self._config.vocab_size, self._config.hidden_size

    def _numbered_layer(self, index: int) -> LayerWeights[AnyLinear]:
        """All weights of one of the L layers."""
        member = self._builder.member
        if member is not None and index < member.num_whole:
            return _Loader(member.config, self._source, self._builder)._cut_or_whole(index)
        return self._cut_or_whole(index)

    def _cut_or_whole(self, index: int) -> LayerWeights[AnyLinear]:
        return self._layer(f"model.layers.{index}", sparse=index in self._config.sparse_layers)

    def _layer(self, prefix: str, *, sparse: bool = False) -> LayerWeights[AnyLinear]:
        """All weights of a layer, whose tensors' names begin with `prefix`; `sparse`: with experts."""
        return_freed_memory()  # of the layer before; else the heap grows with every weight that is computed
        stored = stored_weights(self._config, sparse=sparse)
        names = {ours: [f"{prefix}.{name}" for name in theirs] for ours, theirs in stored.items()}
        shapes = {ours: stored_shapes(self._config, ours, len(theirs)) for ours, theirs in stored.items()}
        linears = {ours: self._matrix(ours, names[ours], shapes[ours]) for ours in MATRICES if ours in stored}
        norms = {ours: self._norm(f"{names[ours][0]}.weight", shapes[ours][0]) for ours in NORMS if ours in stored}
        return LayerWeights(
            attention_norm=norms.get("attention_norm"),
            qkv=linears["qkv"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            o=linears["o"],
            post_attention_norm=norms.get("post_attention_norm"),
            mlp_norm=norms.get("mlp_norm"),
            gate_up=linears.get("gate_up"),
            down=linears.get("down"),
            experts=self._experts(prefix, linears["router"]) if sparse else None,
            post_mlp_norm=norms.get("post_mlp_norm"),
        )

    def _experts(self, prefix: str, router: AnyLinear) -> Experts[AnyLinear]:
        """The experts of a layer."""

        def read(number: int, ours: str) -> AnyLinear:
            theirs = expert_weights(self._config, number)[ours]
            shapes = stored_shapes(self._config, ours, len(theirs), expert=True)
            return self._linear(ours, [f"{prefix}.{name}" for name in theirs], shapes)

        return Experts(
            router=router,
            experts=tuple(
                Expert(gate_up=read(number, "gate_up"), down=read(number, "down"))
                for number in range(self._config.num_experts)
            ),
            per_token=self._config.num_experts_per_tok,
        )

    def _matrix(self, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> AnyLinear:
        """One of a layer's matrices."""
        member = self._builder.member
        idle = member is not None and self._config is not member.config and not member.share.adds_heads
        if not idle or ours not in ("qkv", "o"):
            return self._linear(ours, names, shapes)
        if ours not in self._idle:
            self._idle[ours] = self._linear(ours, names, shapes)
        return self._idle[ours]

    def _linear(self, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> AnyLinear:
        """One of a layer's matrices, which a checkpoint may have in several tensors."""
        bias = None
        if has_bias(self._config, ours):
            biases = [
                read_tensor(self._source, f"{name}.bias", shape[:1]) for name, shape in zip(names, shapes, strict=True)
            ]
            bias = torch.cat(biases).to(self._builder.device, self._builder.dtype)
        tensors = [f"{name}.weight" for name in names]
        blocks = self._blocks(tensors, shapes, ours)
        return self._builder.linear(ours, self._stack(tensors, shapes) if blocks is None else blocks, bias)

    def _norm(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norm weights are kept in float32: norms are computed in it, whatever the model's dtype."""
        weight = read_tensor(self._source, name, shape)
        return (weight.float() + self._config.norm_weight_offset).to(self._builder.device)

    def _head_norm(self, name: str) -> Tensor:
        """The norm before the head, whose weights include the factor on logits."""
        return self._norm(name, (self._config.hidden_size,)) * self._config.logits_multiplier

    def _blocks(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], ours: str = "head"
    ) -> tuple[BlockWeight, ...] | None:
        """A weight's tensors in their blocks; None where the network doesn't keep them (`kept_formats`)."""
        if not self._builder.keeps_blocks or kept_formats(self._source, ours, names, shapes) is None:
            return None
        weights = []
        for name, shape in zip(names, shapes, strict=True):
            weight = self._source.blocks(name)
            check_shape(name, weight.shape, shape)
            weights.append(weight)
        return tuple(weights)

    def _stack(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Tensors of the checkpoint one below the other, each copied straight into its place."""
        if len(names) == 1 and self._builder.copies(shapes[0][1]):
            stored = self._source.stored(names[0])
            if stored.mapped and stored.dtype == self._builder.dtype:  # packed from the file itself
                return read_tensor(self._source, names[0], shapes[0])
        rows = [shape[0] for shape in shapes]
        stack = self._empty(sum(rows), shapes[0][1])
        for name, shape, place in zip(names, shapes, torch.split(stack, rows), strict=True):
            fill(place, self._source, name, shape)
        return stack

    def _empty(self, outputs: int, inputs: int) -> Tensor:
        """[O, I], room for a weight.

        What lives for a moment is mapped by itself. malloc would put it on its heap (glibc raises the size from which
        it maps with every mapping that is freed, up to 32 MiB), packed weights would land behind it, and holes and an
        untrimmed top would stay: twice the largest weight for nothing.
        """
        device, dtype = self._builder.device, self._builder.dtype
        if device.type != "cpu" or not self._builder.copies(inputs):
            return torch.empty(outputs, inputs, dtype=dtype, device=device)
        memory = map_private(outputs * inputs * dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype).view(outputs, inputs)


class _OffloadingLoader(_Loader[Linear]):
    """Leaves the last layers in the CPU's memory."""

    def _layers(self, plan: LoadingPlan, others: list[LayerWeights[Linear]]) -> Sequence[LayerWeights[Linear]]:
        first, last = plan.resident_layers, self._config.num_layers
        assert first is not None
        builder = HostBuilder(device=torch.device("cpu"), dtype=plan.dtype, target=plan.device)
        host = _Loader[Linear](self._config, self._source, builder)
        layers = [(self if index < first else host)._numbered_layer(index) for index in range(self._config.num_layers)]
        offloaded = OffloadedLayers([*layers, *others], first, last, plan.device)
        logger.warning(
            "device_memory: %d of %d layers stay in the CPU's memory; %.2f GB are copied for each pass through them, "
            "which takes about %.3f s",
            last - first,
            last,
            offloaded.num_bytes / 1e9,
            offloaded.seconds(),
        )
        return offloaded
