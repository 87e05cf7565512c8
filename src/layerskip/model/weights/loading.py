"""From a checkpoint's tensors to a `Decoder`: names, shapes, stacking, dtype; one weight copied at a time.

Shapes: D width, V vocabulary, I width of the MLP, H and H_kv heads, D_head channels of a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.errors import WeightsError
from layerskip.model.blocks import BLOCK, BLOCK_BYTES, BlockFormat, BlockWeight, stacked
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder, Network
from layerskip.model.drafts import DraftWeights
from layerskip.model.graphs.compiled import RoundMode
from layerskip.model.native.library import PANEL
from layerskip.model.native.memory import WeightMemory, map_private
from layerskip.model.native.network import NativeLinear, NativeNetwork, interleave
from layerskip.model.rope import RopeTable
from layerskip.model.torch.linear import DenseLinear, Linear, make_linear, packs
from layerskip.model.torch.network import LayerWeights, TorchNetwork
from layerskip.model.weights.quantization import native_storage, quantize_linear

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ONE_THREAD = 2**15 - 1
"""Numbers up to which torch copies without waking other threads."""
SMALL = 2**20
"""Numbers up to which one thread copies about as fast as several, and ten times as fast beside other work, when each
copy waits until the others get a processor."""
NORMS = ("attention_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")


class TensorSource(Protocol):
    """Tensors by name, on the CPU, in the dtype of the file."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def get(self, name: str) -> Tensor:
        """One tensor. If it is memory-mapped, then by a mapping of its own, so that its pages go when it does."""
        ...

    def block_format(self, name: str) -> BlockFormat | None:
        """The blocks that hold the tensor's numbers exactly, where the file has it in such; None elsewhere."""
        ...

    def blocks(self, name: str) -> BlockWeight:
        """A tensor that has a `block_format`, in these blocks."""
        ...


def load_decoder(
    config: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    native: bool = False,
    quantize: str | None = None,
    draft: DraftWeights | None = None,
    rounds: RoundMode = "off",
) -> Decoder:
    """Build the network, copying one weight at a time.

    The embedding table of a network whose head is packed stays memory-mapped in the file's dtype, so that a tied
    table isn't held twice. On a CPU the peak is the network's own size and one copy of its largest weight.

    Args:
        config: Sizes and switches.
        source: The checkpoint's tensors.
        dtype: Dtype of the weights in memory.
        device: Where they go.
        max_context: Longest sequence in tokens that will be run.
        native: Run it by compiled kernels (`native_network.why_not_native` says whether they can).
        quantize: Keep layers and head in fewer bits (`quantization.check_quantization` says whether that works here).
        draft: Other weights to draft with; None: the same.
        rounds: How whole greedy rounds run, in a network that is not native.

    Raises:
        WeightsError: A tensor is missing, unknown, or of the wrong shape.
    """
    check_names(config, source.names())
    target = _Target(device=device, dtype=dtype, native=native, quantize=quantize, plain=rounds == "max")
    embedding, head = _load_tables(config, source, target)
    layers = [_load_layer(config, index, source, target) for index in range(config.num_layers)]
    shared = _Shared(
        config=config,
        embedding=embedding,
        final_norm=_norm_weight(config, _checked(source, FINAL_NORM, (config.hidden_size,)), device),
        ropes={
            kind: RopeTable(rope, max_context, dtype, device)
            for kind, rope in config.ropes.items()
            if kind in config.layer_types
        },
        target=target,
        max_context=max_context,
    )
    decoder = shared.decoder(layers, head, rounds=rounds)
    if draft is not None:
        few = replace(target, quantize=draft.quantize or quantize)
        if draft.quantize is not None:
            layers = [_load_layer(config, index, source, few) for index in range(max(1, config.num_layers // 2))]
        token_ids = None if draft.tokens is None else torch.tensor(draft.tokens, device=device)
        drafter = shared.decoder(layers, _load_draft_head(config, source, few, token_ids), token_ids)
        decoder.set_drafter(drafter, num_layers=len(layers), shares_states=draft.quantize is None)
    return decoder


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must have."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        for ours, theirs in FAMILIES[config.model_type].weights.items():
            for name, shape in zip(theirs, _part_shapes(config, ours, len(theirs)), strict=True):
                shapes[f"model.layers.{index}.{name}.weight"] = shape
                if _has_bias(config, ours):
                    shapes[f"model.layers.{index}.{name}.bias"] = shape[:1]
    return shapes


def weight_bytes(config: ModelConfig, source: TensorSource, dtype: torch.dtype, *, keeps_blocks: bool) -> int:
    """Bytes of the network's weights in memory.

    Args:
        config: Sizes and switches.
        source: The checkpoint's tensors.
        dtype: Of weights that aren't kept in blocks.
        keeps_blocks: Whether weights stay in the blocks of the file.
    """
    total = 0
    for name, shape in tensor_shapes(config).items():
        kept = source.block_format(name) if keeps_blocks and name in source.names() else None
        count = torch.Size(shape).numel()
        total += count * dtype.itemsize if kept is None else count // BLOCK * BLOCK_BYTES[kept]
    return total


def with_own_head(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """The configuration that the tensors are of: a head that differs from the embedding isn't tied to it.

    Files say `tie_word_embeddings` and have a head of their own all the same. transformers compares the tensors, and
    uses a head that differs.
    """
    if not config.tie_word_embeddings or not {EMBEDDING, HEAD} <= source.names():
        return config
    head, embedding = source.get(HEAD), source.get(EMBEDDING)
    if head.shape == embedding.shape and torch.equal(head[:1], embedding[:1]) and torch.equal(head, embedding):
        return config
    return replace(config, tie_word_embeddings=False)


def check_names(config: ModelConfig, names: Iterable[str]) -> None:
    """Raise `WeightsError` unless the checkpoint has exactly the tensors that the network uses."""
    present = set(names)
    if config.num_layers > len(present):  # before a list of that many layers' tensors is made
        raise WeightsError(
            f"the checkpoint has {len(present)} tensors, too few for the {config.num_layers} layers of config.json; "
            "its files are incomplete, or config.json doesn't describe them"
        )
    expected = set(tensor_shapes(config))
    missing = sorted(expected - present)
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
            "its files are incomplete, or config.json doesn't describe them"
        )
    unknown = sorted(n for n in present - expected if n != HEAD and not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise WeightsError(
            f"the checkpoint has {len(unknown)} tensors that a {config.model_type!r} model with this config.json "
            f"doesn't use, first {unknown[0]!r}; config.json doesn't describe them"
        )


def _part_shapes(config: ModelConfig, ours: str, parts: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the checkpoint's tensors that make up one of our weights."""
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    match ours:
        case "qkv":
            return ((q, width), (kv, width), (kv, width)) if parts == 3 else ((q + 2 * kv, width),)
        case "o":
            return ((width, q),)
        case "gate_up":
            return ((inner, width),) * 2 if parts == 2 else ((2 * inner, width),)
        case "down":
            return ((width, inner),)
        case "q_norm" | "k_norm":
            return ((config.head_dim,),)
        case _:
            return ((width,),)


def _has_bias(config: ModelConfig, ours: str) -> bool:
    switches = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    return switches.get(ours, False)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where weights go."""

    device: torch.device
    dtype: torch.dtype
    native: bool
    quantize: str | None
    plain: bool
    """Weights as torch keeps them: `torch.compile` can't look into those that oneDNN has reordered."""
    memory: WeightMemory = field(default_factory=WeightMemory)

    def packs(self, shape: Sequence[int]) -> bool:
        """Whether `linear` copies such a weight once more, so that what it is given lives for a moment only."""
        if self.native or self.quantize is not None:
            return True
        return not self.plain and packs(self.device, self.dtype, shape[1])

    @property
    def keeps_blocks(self) -> bool:
        """Whether weights stay in the blocks that a file has them in."""
        return self.native and self.quantize is None

    def block_linear(self, ours: str, parts: Sequence[BlockWeight], bias: Tensor | None = None) -> Linear:
        """`linear` for the tensors of a weight in blocks of one format."""
        if ours != "gate_up":
            return NativeLinear(stacked(parts), bias=bias, memory=self.memory)
        if len(parts) == 1:
            parts = [BlockWeight(parts[0].format, half) for half in parts[0].data.chunk(2)]
        return NativeLinear(*parts, bias=None if bias is None else interleave(bias), memory=self.memory)

    def linear(self, ours: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The layer's part or the head (`ours`) as the network multiplies by it."""
        if not self.native and self.quantize is not None:
            return quantize_linear(weight, bias, self.quantize)
        if not self.native:
            return DenseLinear(weight, bias) if self.plain else make_linear(weight, bias)
        storage = native_storage(self.quantize, weight.shape[1])
        if ours == "gate_up":
            bias = None if bias is None else interleave(bias)
            return NativeLinear(*weight.chunk(2), bias=bias, storage=storage, memory=self.memory)
        if ours == "down" and weight.shape[1] % PANEL:  # as many inputs as gate and up have outputs
            weight = F.pad(weight, (0, -weight.shape[1] % PANEL))
            storage = native_storage(self.quantize, weight.shape[1])
        return NativeLinear(weight, bias=bias, storage=storage, memory=self.memory)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Room for a weight.

        What lives for a moment is mapped by itself. malloc would put it on its heap (glibc raises the size from which
        it maps with every mapping that is freed, up to 32 MiB), packed weights would land behind it, and holes and an
        untrimmed top would stay: twice the largest weight for nothing.
        """
        if self.device.type != "cpu" or not self.packs(shape):
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        memory = map_private(torch.Size(shape).numel() * self.dtype.itemsize)
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all decoders of a checkpoint have in common."""

    config: ModelConfig
    embedding: Tensor | BlockWeight
    final_norm: Tensor
    ropes: dict[str, RopeTable]
    target: _Target
    max_context: int

    def decoder(
        self,
        layers: list[LayerWeights],
        head: Linear,
        token_ids: Tensor | None = None,
        rounds: RoundMode = "off",
    ) -> Decoder:
        """A decoder with these layers and this head."""
        if isinstance(head, NativeLinear):
            network: Network = NativeNetwork(
                self.config,
                layers=layers,
                final_norm=self.final_norm,
                head=head,
                embedding=self.embedding,
                ropes=self.ropes,
                tokens=token_ids,
            )
        else:
            network = TorchNetwork(self.config, layers=layers, final_norm=self.final_norm, head=head)
        return Decoder(
            self.config,
            embedding=self.embedding,
            network=network,
            ropes=self.ropes,
            dtype=self.target.dtype,
            device=self.target.device,
            max_context=self.max_context,
            token_ids=token_ids,
            rounds=rounds,
        )


def _load_tables(config: ModelConfig, source: TensorSource, target: _Target) -> tuple[Tensor | BlockWeight, Linear]:
    """Embedding table and head, before the layers: their copies are the largest and exist while little else does."""
    shapes = [(config.vocab_size, config.hidden_size)]
    head_name = EMBEDDING if config.tie_word_embeddings else HEAD
    blocks = _blocks(source, [head_name], shapes, target)
    if blocks is not None:
        table = _blocks(source, [EMBEDDING], shapes, target)
        embedding = _checked(source, EMBEDDING, shapes[0]) if table is None else table[0]
        return embedding, target.block_linear("head", blocks)
    packed = target.packs(shapes[0])
    if config.tie_word_embeddings and not packed:
        embedding = _stack(source, [EMBEDDING], shapes, target)
        return embedding, target.linear("head", embedding)
    head = target.linear("head", _stack(source, [head_name], shapes, target))
    if packed and target.device.type == "cpu":  # mapped anew, without the pages that the head was copied from
        return _checked(source, EMBEDDING, shapes[0]), head
    return _stack(source, [EMBEDDING], shapes, target), head


def _load_draft_head(config: ModelConfig, source: TensorSource, target: _Target, token_ids: Tensor | None) -> Linear:
    """The head with the outputs that drafts are chosen among."""
    name = EMBEDDING if config.tie_word_embeddings else HEAD
    weight = _stack(source, [name], [(config.vocab_size, config.hidden_size)], target)
    return target.linear("head", weight if token_ids is None else weight[token_ids.to(weight.device)])


def _load_layer(config: ModelConfig, index: int, source: TensorSource, target: _Target) -> LayerWeights:
    weights: dict[str, Linear | Tensor] = {}
    for ours, theirs in FAMILIES[config.model_type].weights.items():
        shapes = _part_shapes(config, ours, len(theirs))
        names = [f"model.layers.{index}.{name}" for name in theirs]
        if ours in NORMS:
            norm = _checked(source, names[0] + ".weight", shapes[0])
            weights[ours] = _norm_weight(config, norm, target.device)
            continue
        bias = None
        if _has_bias(config, ours):
            parts = [_checked(source, name + ".bias", shape[:1]) for name, shape in zip(names, shapes, strict=True)]
            bias = torch.cat(parts).to(target.device, target.dtype)
        tensors = [name + ".weight" for name in names]
        blocks = _blocks(source, tensors, shapes, target)
        if blocks is not None:
            weights[ours] = target.block_linear(ours, blocks, bias)
        else:
            weights[ours] = target.linear(ours, _stack(source, tensors, shapes, target), bias)
    return LayerWeights(**weights)  # type: ignore[arg-type]


def _blocks(
    source: TensorSource, names: Sequence[str], shapes: Sequence[tuple[int, ...]], target: _Target
) -> tuple[BlockWeight, ...] | None:
    """A weight's tensors in blocks of one format that holds them all; None where they aren't, or aren't kept so."""
    formats = [source.block_format(name) for name in names]
    if not target.keeps_blocks or None in formats or (len(set(formats)) > 1 and "q4_1" in formats):
        return None
    parts = []
    for name, shape in zip(names, shapes, strict=True):
        part = source.blocks(name)
        check_shape(name, part.shape, shape)
        parts.append(part if len(set(formats)) == 1 else part.widened())
    return tuple(parts)


def _stack(source: TensorSource, names: Sequence[str], shapes: Sequence[tuple[int, ...]], target: _Target) -> Tensor:
    """Tensors of the checkpoint one below the other, each copied straight into its place."""
    if len(names) == 1 and target.packs(shapes[0]):
        tensor = _checked(source, names[0], shapes[0])
        if tensor.dtype == target.dtype:  # packed from the file itself
            return tensor
    rows = [shape[0] for shape in shapes]
    stacked = target.empty((sum(rows), *shapes[0][1:]))
    for name, shape, part in zip(names, shapes, torch.split(stacked, rows), strict=True):
        _copy(part, _checked(source, name, shape))
    return stacked


def _copy(target: Tensor, tensor: Tensor) -> None:
    """Copy a tensor into its place, a small one by this thread alone."""
    if target.device.type != "cpu" or not ONE_THREAD < tensor.numel() <= SMALL:
        target.copy_(tensor)
        return
    for piece, given in zip(*(torch.split(x.reshape(-1), ONE_THREAD) for x in (target, tensor)), strict=True):
        piece.copy_(given)


def _norm_weight(config: ModelConfig, weight: Tensor, device: torch.device) -> Tensor:
    """Norm weights are kept in float32: norms are computed in it, whatever the model's dtype."""
    return (weight.float() + config.norm_weight_offset).to(device)


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise `WeightsError` unless a tensor has the shape that the configuration asks for."""
    if found != wanted:
        raise WeightsError(f"tensor {name!r} has shape {found}; config.json asks for {wanted}")


def _checked(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.get(name)
    check_shape(name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point():
        raise WeightsError(f"tensor {name!r} has dtype {tensor.dtype}; weights must be floating point")
    return tensor
