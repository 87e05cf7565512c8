"""One function of a round: called as it is, compiled by torch.compile, or captured as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerskip.model.graphs.rows import RowInputs
from layerskip.model.graphs.static import StaticPart

WARM_UPS = 3
"""Runs before a capture, in which libraries choose kernels and allocate; PyTorch's documentation asks for them."""
MOST_RECOMPILATIONS = 10_000
"""For torch.compile every shape is a recompilation of the same code, of which it allows eight."""


class Recorder:
    """Stream and memory of all captures.

    Graphs share memory, so one that runs may overwrite whatever another one has left in it. What is needed for longer
    than until the next graph runs (`drafting.DraftState`) is allocated outside.
    """

    def __init__(self, device: torch.device) -> None:
        """Make both on a device."""
        with torch.cuda.device(device):
            # torch's own capture stream is one for the process, on the device that was first captured on.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool: Any = torch.cuda.graph_pool_handle()
        self._device = device

    def record(self, call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up beside the current stream, then record a call; returns the graph and where its result will be."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    call()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = call()
        return graph, outputs


class Program:
    """A function with its inputs."""

    def __init__(self, function: StaticPart, inputs: RowInputs) -> None:
        """Begin with the function as it is.

        Args:
            function: What to run.
            inputs: What it reads of its rows; other functions may read it too.
        """
        self.part = function
        self.inputs = inputs
        self._function: Callable[[Tensor], Tensor] = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Tensor | None = None

    def run(self) -> Tensor:
        """The function of its present inputs, on the device; the next graph that runs may overwrite the result."""
        if self._graph is None:
            return self._call()
        assert self._outputs is not None
        self._graph.replay()
        return self._outputs

    def compile(self) -> None:
        """Hand the function to `torch.compile`, which works when it is first called."""
        self._function = torch.compile(self._function, dynamic=False, fullgraph=True)

    def capture(self, recorder: Recorder) -> None:
        """Make a graph of the function, which runs on its present inputs meanwhile."""
        self._graph, self._outputs = recorder.record(self._call)

    def _call(self) -> Tensor:
        if self._function is self.part:
            return self._function(self.inputs.tensor)
        with torch._dynamo.config.patch(
            recompile_limit=MOST_RECOMPILATIONS, accumulated_recompile_limit=MOST_RECOMPILATIONS
        ):
            return self._function(self.inputs.tensor)
