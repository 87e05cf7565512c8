"""Layers that stay in the CPU's memory and are copied to the device as they run.

Two buffers on the device take turns: while a layer runs from one, the next layer is copied into the other. On CUDA the
copies come from pinned memory, on a stream of their own. Elsewhere they are made when a layer is needed.

Shapes: O output width, I input width.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from layerskip.model.torch.linear import DenseLinear, Linear
from layerskip.model.torch.network import LayerWeights

LINEARS = ("qkv", "o", "gate_up", "down")
NORMS = ("attention_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
ALIGNMENT = 256
"""Bytes to which weights in a buffer are aligned."""


class HostLinear:
    """A weight in the CPU's memory (`torch.linear.Linear`), which is multiplied by once it has been copied."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        """Keep a weight.

        Args:
            weight: [O, I], on the CPU; copied into pinned memory if the device is CUDA's.
            bias: [O], or None.
            device: Where it will be copied to; the bias is there at once.
        """
        self.weight = weight.pin_memory() if device.type == "cuda" else weight
        self.bias = None if bias is None else bias.to(device)

    @property
    def num_bytes(self) -> int:
        """Bytes that a product of a few rows reads."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("a weight in the CPU's memory is copied before it is multiplied by")


class OffloadedLayers(Sequence[LayerWeights[Linear]]):
    """A network's layers, of which the last ones are on the CPU; a layer that is asked for is on the device.

    It stays there until the next but one layer of the CPU's is asked for.
    """

    def __init__(self, layers: Sequence[LayerWeights[Linear]], first: int, last: int, device: torch.device) -> None:
        """Make the buffers.

        Args:
            layers: All layers, and those of exit adapters behind them.
            first: The first layer whose weights are `HostLinear`s.
            last: One past the last such layer.
            device: Where layers run.
        """
        self._layers, self._offloaded, self._device = list(layers), range(first, last), device
        self._norms_on_device()
        size = max(buffer_bytes(self._weights(index)) for index in self._offloaded)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        self._copied: list[Any] = [None, None]
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied in a pass through all layers."""
        return sum(weight.num_bytes for index in self._offloaded for weight in self._weights(index))

    def seconds(self) -> float:
        """How long the copies of a pass take, from the time of one layer."""
        best = float("inf")
        for _ in range(2):  # the first touches memory
            began = time.perf_counter()
            self._copy(self._offloaded[0], 0)
            if self._stream is not None:
                self._stream.synchronize()
            best = min(best, time.perf_counter() - began)
        one = sum(weight.num_bytes for weight in self._weights(self._offloaded[0]))
        return best * self.num_bytes / one

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> LayerWeights[Linear]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights[Linear]]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights[Linear] | Sequence[LayerWeights[Linear]]:
        """A layer on the device; of several, where they are: for what they weigh."""
        if isinstance(index, slice) or index not in self._offloaded:
            return self._layers[index]
        if index not in self._held:
            self._copy(index, 1 - self._held.index(self._current) if self._current in self._held else 0)
        slot = self._held.index(index)
        if self._current != index:
            self._current = index
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_event(self._copied[slot])
                self._prefetch(index, 1 - slot)
        return self._on_device[slot]

    _current: int | None = None
    """The layer that was asked for last."""

    def _prefetch(self, index: int, slot: int) -> None:
        """Begin to copy the layer that comes next: after the last one, the first of the next pass."""
        following = self._offloaded[(self._offloaded.index(index) + 1) % len(self._offloaded)]
        if following != index and following not in self._held:
            self._copy(following, slot)

    def _copy(self, index: int, slot: int) -> None:
        """Copy a layer's weights into a buffer, once what runs from it has ended."""
        if self._stream is None:
            self._fill(index, slot)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._fill(index, slot)
            self._copied[slot] = self._stream.record_event()

    def _fill(self, index: int, slot: int) -> None:
        start = 0
        linears: dict[str, Any] = {}
        for name, weight in zip(LINEARS, self._weights(index), strict=True):
            stop = start + weight.num_bytes
            place = self._buffers[slot][start:stop].view(weight.weight.dtype).view(weight.weight.shape)
            place.copy_(weight.weight, non_blocking=True)
            linears[name] = DenseLinear(place, weight.bias)
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        self._on_device[slot] = replace(self._layers[index], **linears)
        self._held[slot] = index

    def _weights(self, index: int) -> list[HostLinear]:
        linears = [getattr(self._layers[index], name) for name in LINEARS]
        assert all(isinstance(linear, HostLinear) for linear in linears)
        return linears

    def _norms_on_device(self) -> None:
        self._on_device = [self._layers[self._offloaded[0]]] * 2
        for index in self._offloaded:
            norms = {name: getattr(self._layers[index], name) for name in NORMS}
            moved: dict[str, Any] = {
                name: None if norm is None else norm.to(self._device) for name, norm in norms.items()
            }
            self._layers[index] = replace(self._layers[index], **moved)


def buffer_bytes(weights: Sequence[HostLinear]) -> int:
    """Bytes of a buffer for a layer."""
    return sum(-(-weight.num_bytes // ALIGNMENT) * ALIGNMENT for weight in weights)
