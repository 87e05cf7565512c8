"""What a decoder needs of its layers and its head, whatever computes them.

Shapes: B rows, Q query tokens a row, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.positions import Positions, ValueSource


class HasBytes(Protocol):
    """Weights that know their size."""

    @property
    def num_bytes(self) -> int:
        """Bytes that a pass reads."""
        ...


class Network(Protocol):
    """Layers and head with their weights: `torch.network.TorchNetwork`, or `native.network.NativeNetwork`."""

    @property
    def kernels(self) -> str:
        """`native` or `torch`."""
        ...

    @property
    def layers(self) -> Sequence[HasBytes]:
        """Weights of each layer, then those of the exit adapters."""
        ...

    @property
    def head(self) -> HasBytes:
        """D -> V."""
        ...

    def run_layers(self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int) -> Tensor:
        """[B, Q, D], the input of layer `start` -> [B, Q, D], the output of layer `stop - 1`.

        The keys and values of exit adapters between them are written too.
        """
        ...

    def run_adapter(
        self, layer: int, hidden: Tensor, positions: Positions, cache: KVCache, source: ValueSource
    ) -> Tensor:
        """[B, Q, D], the output of an exit -> [B, Q, D], the output of its adapter, which is layer `layer`."""
        ...

    def write_keys(self, layer: int, hidden: Tensor, positions: Positions, cache: KVCache) -> None:
        """Write a layer's keys and values for its input [B, Q, D], without running it."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, V] in float32, before any cap."""
        ...
