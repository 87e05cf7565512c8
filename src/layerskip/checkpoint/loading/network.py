"""From a checkpoint's tensors to a `Decoder`, one weight copied at a time.

Shapes: O output width, I input width, D width, V vocabulary, N tokens among which drafts are chosen.
"""

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from layerskip.checkpoint.loading.builders import NativeBuilder, NetworkBuilder, SharedWeights, TorchBuilder
from layerskip.checkpoint.loading.plan import DraftWeights, LoadingPlan
from layerskip.checkpoint.loading.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    TensorSource,
    check_shape,
    has_bias,
    read_tensor,
    stored_shapes,
)
from layerskip.model.blocks import BlockWeight
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder, LayerCalls
from layerskip.model.native.memory import map_private
from layerskip.model.rope import RopeTable
from layerskip.model.torch.linear import AnyLinear
from layerskip.model.torch.network import LayerWeights

MATRICES = ("qkv", "o", "gate_up", "down")
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
    """
    if plan.network == "native":
        return _Loader(config, source, NativeBuilder.of(plan)).load(plan)
    return _Loader(config, source, TorchBuilder.of(plan)).load(plan)


class _Loader(Generic[AnyLinear]):
    """Reads one checkpoint's tensors for one kind of network."""

    def __init__(self, config: ModelConfig, source: TensorSource, builder: NetworkBuilder[AnyLinear]) -> None:
        self._config = config
        self._source = source
        self._builder = builder

    def load(self, plan: LoadingPlan) -> Decoder:
        """The network, and the one that drafts for it if the plan has one."""
        config = self._config
        embedding, head = self._tables()
        layers = [self._layer(index) for index in range(config.num_layers)]
        shared = SharedWeights(
            config=config,
            embedding=embedding,
            final_norm=self._norm(FINAL_NORM, (config.hidden_size,)),
            ropes={
                kind: RopeTable(rope, plan.context, plan.dtype, plan.device)
                for kind, rope in config.ropes.items()
                if kind in config.layer_types
            },
        )
        decoder = self._decoder(shared, layers, head, plan)
        if plan.draft is not None:
            self._set_drafter(decoder, shared, layers, plan, plan.draft)
        return decoder

    def _set_drafter(
        self,
        decoder: Decoder,
        shared: SharedWeights,
        layers: Sequence[LayerWeights[AnyLinear]],
        plan: LoadingPlan,
        draft: DraftWeights,
    ) -> None:
        """Let a network with other weights draft for the decoder."""
        builder = self._builder.for_drafts(draft.quantize or plan.quantize)
        loader = _Loader(self._config, self._source, builder)
        if draft.quantize is not None:
            layers = [loader._layer(index) for index in range(max(1, self._config.num_layers // 2))]
        tokens = None if draft.tokens is None else torch.tensor(draft.tokens, device=plan.device)
        drafter = loader._decoder(shared, layers, loader._draft_head(tokens), plan, tokens, decoder.calls)
        decoder.set_drafter(drafter, num_layers=len(layers), shares_states=draft.quantize is None)

    def _decoder(
        self,
        shared: SharedWeights,
        layers: Sequence[LayerWeights[AnyLinear]],
        head: AnyLinear,
        plan: LoadingPlan,
        tokens: Tensor | None = None,
        calls: LayerCalls | None = None,
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
            token_ids=tokens,
            calls=calls,
        )

    def _tables(self) -> tuple[Tensor | BlockWeight, AnyLinear]:
        """Embedding table and head. They come before the layers: their copies are the largest."""
        builder, source, tied = self._builder, self._source, self._config.tie_word_embeddings
        shape = self._table_shape
        blocks = self._blocks([self._head_name], [shape])
        if blocks is not None:
            table = self._blocks([EMBEDDING], [shape])
            return read_tensor(source, EMBEDDING, shape) if table is None else table[0], builder.linear("head", blocks)
        copied = builder.copies(shape[1])
        if tied and not copied:
            embedding = self._stack([EMBEDDING], [shape])
            return embedding, builder.linear("head", embedding)
        head = builder.linear("head", self._stack([self._head_name], [shape]))
        if copied and builder.device.type == "cpu":  # mapped anew, without the pages that the head was copied from
            return read_tensor(source, EMBEDDING, shape), head
        return self._stack([EMBEDDING], [shape]), head

    def _draft_head(self, tokens: Tensor | None) -> AnyLinear:
        """The head with the outputs that drafts are chosen among."""
        weight = self._stack([self._head_name], [self._table_shape])
        return self._builder.linear("head", weight if tokens is None else weight[tokens.to(weight.device)])

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self._config.tie_word_embeddings else HEAD

    @property
    def _table_shape(self) -> tuple[int, int]:
        return self._config.vocab_size, self._config.hidden_size

    def _layer(self, index: int) -> LayerWeights[AnyLinear]:
        """All weights of a layer."""
        stored = FAMILIES[self._config.model_type].weights
        names = {ours: [f"model.layers.{index}.{name}" for name in theirs] for ours, theirs in stored.items()}
        shapes = {ours: stored_shapes(self._config, ours, len(theirs)) for ours, theirs in stored.items()}
        linears = {ours: self._linear(ours, names[ours], shapes[ours]) for ours in MATRICES}
        norms = {ours: self._norm(f"{names[ours][0]}.weight", shapes[ours][0]) for ours in NORMS if ours in stored}
        return LayerWeights(
            attention_norm=norms["attention_norm"],
            qkv=linears["qkv"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            o=linears["o"],
            post_attention_norm=norms.get("post_attention_norm"),
            mlp_norm=norms["mlp_norm"],
            gate_up=linears["gate_up"],
            down=linears["down"],
            post_mlp_norm=norms.get("post_mlp_norm"),
        )

    def _linear(self, ours: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> AnyLinear:
        """One of a layer's matrices, which a checkpoint may have in several tensors."""
        bias = None
        if has_bias(self._config, ours):
            biases = [
                read_tensor(self._source, f"{name}.bias", shape[:1]) for name, shape in zip(names, shapes, strict=True)
            ]
            bias = torch.cat(biases).to(self._builder.device, self._builder.dtype)
        tensors = [f"{name}.weight" for name in names]
        blocks = self._blocks(tensors, shapes)
        return self._builder.linear(ours, self._stack(tensors, shapes) if blocks is None else blocks, bias)

    def _norm(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norm weights are kept in float32: norms are computed in it, whatever the model's dtype."""
        weight = read_tensor(self._source, name, shape)
        return (weight.float() + self._config.norm_weight_offset).to(self._builder.device)

    def _blocks(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[BlockWeight, ...] | None:
        """A weight's tensors in blocks of one format; None where no format has them all, or blocks aren't kept."""
        formats = {self._source.block_format(name) for name in names}
        if not self._builder.keeps_blocks or None in formats or (len(formats) > 1 and "q4_1" in formats):
            return None
        weights = []
        for name, shape in zip(names, shapes, strict=True):
            weight = self._source.blocks(name)
            check_shape(name, weight.shape, shape)
            weights.append(weight if len(formats) == 1 else weight.widened())
        return tuple(weights)

    def _stack(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Tensors of the checkpoint one below the other, each copied straight into its place."""
        if len(names) == 1 and self._builder.copies(shapes[0][1]):
            tensor = read_tensor(self._source, names[0], shapes[0])
            if tensor.dtype == self._builder.dtype:  # packed from the file itself
                return tensor
        rows = [shape[0] for shape in shapes]
        stack = self._empty(sum(rows), shapes[0][1])
        for name, shape, place in zip(names, shapes, torch.split(stack, rows), strict=True):
            place.copy_(read_tensor(self._source, name, shape))
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
