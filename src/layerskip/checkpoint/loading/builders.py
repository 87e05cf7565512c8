"""The kinds of networks, as builders: what each makes of a weight, and the network that it puts together.

Shapes: O output width, I input width, D width, V vocabulary, N outputs of a head that has some tokens only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.checkpoint.loading.plan import LoadingPlan
from layerskip.checkpoint.loading.quantization import native_storage, quantize_linear
from layerskip.model.blocks import BlockWeight, stacked
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.decoders.native import NativeDecoder
from layerskip.model.decoders.parallel import ParallelDecoder
from layerskip.model.graphs.compiled import RoundMode
from layerskip.model.native.joined import JoinedLinear
from layerskip.model.native.library import PANEL
from layerskip.model.native.linear import NativeLinear, interleave
from layerskip.model.native.memory import WeightMemory
from layerskip.model.native.network import NativeNetwork
from layerskip.model.parallel.share import Membership
from layerskip.model.rope import RopeTable
from layerskip.model.torch.linear import AnyLinear, DenseLinear, Linear, make_linear, packs
from layerskip.model.torch.network import LayerWeights, TorchNetwork
from layerskip.model.torch.offload import HostLinear


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """What all networks of a checkpoint have in common: the one that verifies and the one that drafts."""

    config: ModelConfig
    embedding: Tensor | BlockWeight
    """[V, D]."""
    final_norm: Tensor
    """[D]."""
    ropes: Mapping[str, RopeTable]
    """By kind of layer."""


class NetworkBuilder(Protocol[AnyLinear]):
    """Makes linear layers of one kind, and a network of them."""

    @property
    def device(self) -> torch.device:
        """Where the weights go."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that aren't in blocks."""
        ...

    @property
    def member(self) -> Membership | None:
        """The ranks that share the network; None: this process has all of it."""
        ...

    @property
    def keeps_blocks(self) -> bool:
        """Whether `linear` takes weights in the blocks of a file, and keeps them so."""
        ...

    @property
    def adapter_bits(self) -> str | None:
        """How exit adapters are quantized where nothing is asked for; None: not at all."""
        ...

    def copies(self, inputs: int) -> bool:
        """Whether `linear` copies a weight [O, I] of I inputs, so that what it is given lives for a moment only."""
        ...

    def linear(self, ours: str, weight: Tensor | Sequence[BlockWeight], bias: Tensor | None = None) -> AnyLinear:
        """A linear layer.

        Args:
            ours: The layer's part (`qkv`, `o`, `gate_up`, `down`, a `router`, or an adapter's `input` or `values`) or
                `head`. A router isn't quantized: a rounded one would choose other experts.
            weight: [O, I]; or the checkpoint's tensors of it in their blocks, one below the other.
            bias: [O], or None.
        """
        ...

    def decoder(
        self, shared: SharedWeights, layers: Sequence[LayerWeights[AnyLinear]], head: AnyLinear, **options: Any
    ) -> Decoder:
        """The decoder.

        Args:
            shared: What it has in common with the checkpoint's other network.
            layers: L layers.
            head: D -> V, or D -> N.
            **options: As for `Decoder`.
        """
        ...

    def for_drafts(self, quantize: str | None) -> "NetworkBuilder[AnyLinear]":
        """A builder of the same kind that keeps weights in these bits, without compiled rounds; both share memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class TorchBuilder:
    """Builds networks of torch's operators, on any device."""

    device: torch.device
    dtype: torch.dtype
    quantize: str | None = None
    rounds: RoundMode | None = None
    """How whole rounds are compiled."""
    uses_before: int | None = None
    """Times that a round runs before it is compiled."""
    member: Membership | None = None
    """The ranks that share the network; None: this process has all of it."""
    plain: bool = False
    """Weights as torch keeps them: `torch.compile` can't look into those that oneDNN has reordered."""

    @classmethod
    def of(cls, plan: LoadingPlan) -> "TorchBuilder":
        """The one that builds what is planned."""
        return cls(
            device=plan.device,
            dtype=plan.dtype,
            quantize=plan.quantize,
            rounds=plan.rounds,
            uses_before=plan.uses_before,
            member=plan.member,
            plain=plan.rounds == "max",
        )

    @property
    def keeps_blocks(self) -> bool:
        """Torch has no products with blocks."""
        return False

    @property
    def adapter_bits(self) -> str | None:
        """None: torch's int8 products aren't faster everywhere."""
        return None

    def copies(self, inputs: int) -> bool:
        """A quantized weight is a copy, and so is one that oneDNN reorders."""
        return self.quantize is not None or (not self.plain and packs(self.device, self.dtype, inputs))

    def linear(self, ours: str, weight: Tensor | Sequence[BlockWeight], bias: Tensor | None = None) -> Linear:
        """The fastest layer for the device, dtype and width."""
        assert isinstance(weight, Tensor), "this builder doesn't keep blocks"
        if self.quantize is not None and ours != "router":
            return quantize_linear(weight, bias, self.quantize)
        return DenseLinear(weight, bias) if self.plain else make_linear(weight, bias)

    def decoder(
        self, shared: SharedWeights, layers: Sequence[LayerWeights[Linear]], head: Linear, **options: Any
    ) -> Decoder:
        """The decoder, with compiled rounds where they are planned."""
        network = TorchNetwork(
            shared.config, layers=layers, final_norm=shared.final_norm, head=head, member=self.member
        )
        if self.member is not None:
            return ParallelDecoder(self.member, network=network, **options)
        if self.rounds is None:
            return Decoder(shared.config, network=network, **options)
        rounds, uses_before = self.rounds, self.uses_before
        return GraphDecoder(shared.config, network=network, rounds=rounds, uses_before=uses_before, **options)

    def for_drafts(self, quantize: str | None) -> "TorchBuilder":
        """The same with these bits."""
        return replace(self, quantize=quantize, rounds=None)


@dataclass(frozen=True, kw_only=True)
class HostBuilder(TorchBuilder):
    """Makes layers that stay in the CPU's memory."""

    target: torch.device
    """Where they are copied to as they run."""

    def copies(self, inputs: int) -> bool:
        """Weights are kept as they are given."""
        return False

    def linear(self, ours: str, weight: Tensor | Sequence[BlockWeight], bias: Tensor | None = None) -> Linear:
        """The weight, for a product on the device."""
        assert isinstance(weight, Tensor), "this builder doesn't keep blocks"
        return HostLinear(weight, bias, self.target)


@dataclass(frozen=True, kw_only=True)
class NativeBuilder:
    """Builds networks of compiled kernels, whose weights lie in panels."""

    device: torch.device
    dtype: torch.dtype
    quantize: str | None = None
    compute: str = "float32"
    """How products are computed, a key of `COMPUTE`, where their weights allow it."""
    member: Membership | None = None
    """As `TorchBuilder.member`."""
    memory: WeightMemory = field(default_factory=WeightMemory)
    """Where the panels are kept."""

    @classmethod
    def of(cls, plan: LoadingPlan) -> "NativeBuilder":
        """The one that builds what is planned."""
        return cls(
            device=plan.device, dtype=plan.dtype, quantize=plan.quantize, compute=plan.compute, member=plan.member
        )

    @property
    def keeps_blocks(self) -> bool:
        """A file's blocks are kept unless other bits are asked for."""
        return self.quantize is None

    @property
    def adapter_bits(self) -> str | None:
        """Fewer bytes to read for each draft, and the text doesn't depend on drafts."""
        return "int8"

    def copies(self, inputs: int) -> bool:
        """All weights are copied into panels."""
        return True

    def linear(self, ours: str, weight: Tensor | Sequence[BlockWeight], bias: Tensor | None = None) -> NativeLinear:
        """The weight in panels, those of gate and up in turn."""
        compute = "float32" if ours == "router" else self.compute
        if not isinstance(weight, Tensor) and len({part.format for part in weight}) > 1:
            return self._joined(ours, weight, bias, compute)
        if ours == "gate_up" and bias is not None:
            bias = interleave(bias)
        if not isinstance(weight, Tensor):
            blocks = _halves(weight) if ours == "gate_up" else [stacked(weight)]
            if ours == "down":
                blocks = [blocks[0].padded(PANEL)]
            return NativeLinear(*blocks, bias=bias, compute=compute, memory=self.memory)
        storage = None if ours == "router" else native_storage(self.quantize, weight.shape[1], compute)
        if ours == "down" and weight.shape[1] % PANEL:  # as many inputs as gate and up have outputs
            weight = F.pad(weight, (0, -weight.shape[1] % PANEL))
        tensors = weight.chunk(2) if ours == "gate_up" else [weight]
        return NativeLinear(*tensors, bias=bias, storage=storage, compute=compute, memory=self.memory)

    def _joined(self, ours: str, weights: Sequence[BlockWeight], bias: Tensor | None, compute: str) -> JoinedLinear:
        """Tensors in several formats; neighbours of one format, but gate and up, become one part."""
        alternate = ours == "gate_up"
        parts = weights if alternate else [stacked(list(run)) for _, run in groupby(weights, lambda part: part.format)]
        rows = [len(part.data) for part in parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias, rows)
        return JoinedLinear(
            [
                NativeLinear(part, bias=own, compute=compute, memory=self.memory)
                for part, own in zip(parts, biases, strict=True)
            ],
            alternate=alternate,
        )

    def decoder(
        self, shared: SharedWeights, layers: Sequence[LayerWeights[NativeLinear]], head: NativeLinear, **options: Any
    ) -> Decoder:
        """The decoder, whose network looks tokens up in the embedding table and rotates by itself."""
        network = NativeNetwork(
            shared.config,
            layers=layers,
            final_norm=shared.final_norm,
            head=head,
            embedding=shared.embedding,
            ropes=shared.ropes,
            tokens=options["token_ids"],
            adapter=options["adapter"],
            member=self.member,
        )
        if self.member is not None:
            return ParallelDecoder(self.member, network=network, **options)
        return NativeDecoder(shared.config, network=network, **options)

    def for_drafts(self, quantize: str | None) -> "NativeBuilder":
        """The same with these bits, in the same memory; what only drafts may compute as is fastest."""
        floats = quantize is None and self.compute == "bfloat16"
        return replace(self, quantize=quantize, compute=self.compute if floats else "int8")


def _halves(parts: Sequence[BlockWeight]) -> Sequence[BlockWeight]:
    """Gate and up, which a checkpoint may have as two tensors or as one."""
    return parts if len(parts) == 2 else [BlockWeight(parts[0].format, half) for half in parts[0].data.chunk(2)]
