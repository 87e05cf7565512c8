"""Whole greedy rounds without the host: captured as CUDA graphs, or compiled, and kept for the next round.

On CUDA a round is hundreds of small kernels, and starting them from Python takes longer than running them. A graph
starts them all at once. What is captured belongs to one shape (`static_round.RoundShape`) and one pair of buffers.

Shapes: B rows, K drafts a row, S slots that attention reads.
"""

import os
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.graphs.cache_pool import CachePool
from layerskip.model.graphs.static import RoundParts, RoundShape, StaticRound, slots_for

RoundMode = Literal["graphs", "max"]
"""`graphs`: captured on CUDA, called as they are on a CPU. `max`: compiled by `torch.compile`, and on CUDA captured."""
MOST_ROUNDS = 32
"""Rounds that are kept; those unused for longest go first."""
USES_BEFORE = 3
"""Times that a round runs uncompiled before it is captured, which takes as long as a handful of rounds."""
WARM_UPS = 3
"""Runs before a capture, in which libraries choose kernels and allocate; PyTorch's documentation asks for them."""
MOST_RECOMPILATIONS = 10_000
"""For torch.compile every shape is a recompilation of the same code, of which it allows eight."""


def why_not_compile(device: torch.device) -> str | None:
    """What keeps `torch.compile` from working for a device; None if nothing is known to."""
    if device.type == "cuda":
        return None if find_spec("triton") is not None else "torch.compile needs the package triton"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(which(name) for name in compilers if name):
        return "torch.compile needs a C++ compiler (g++, clang++ or the one named by CXX), and none was found"
    return None


Key = tuple[RoundShape, int, int]
"""A shape, the address of the buffer of keys, and that of the first row's keys in it."""


@dataclass(frozen=True, kw_only=True)
class CompiledRound:
    """A round that was compiled or captured."""

    shape: RoundShape
    seconds: float
    """Time that it took, warm-up included."""
    problem: str | None = None
    """Why it failed; rounds run uncompiled then."""


class CompiledRounds:
    """Runs rounds, compiling each when it has been asked for often enough."""

    def __init__(
        self,
        parts: RoundParts,
        mode: RoundMode,
        *,
        device: torch.device,
        max_context: int,
        uses_before: int | None = None,
    ) -> None:
        """Begin without any.

        Args:
            parts: The model.
            mode: How to run them.
            device: Where the model lives.
            max_context: Longest sequence in tokens.
            uses_before: Times that a round runs uncompiled before it is compiled; `USES_BEFORE` if not given.
        """
        self.report: list[CompiledRound] = []
        self.provisional = 0
        """Rounds that took longer than the same ones will later: not compiled yet, or compiled on the way."""
        self._parts, self._mode, self._device = parts, mode, device
        self._uses_before = USES_BEFORE if uses_before is None else uses_before
        self._programs: OrderedDict[Key, _Program] = OrderedDict()
        self._uses: Counter[Key] = Counter()
        self._recorder: _Recorder | None = None
        self._failed = False
        self._caches = CachePool(self._allocate, max_context, self._forget)

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache whose buffers may have served other texts, for which rounds are compiled already."""
        return self._caches.take(num_rows, capacity)

    @torch.inference_mode()
    def run(
        self, tokens: Sequence[int], cache: KVCache, *, exit_layer: int, num_drafts: int, stop: int
    ) -> list[list[int]] | None:
        """A round's drafts and targets, B x (2K + 1) token ids; None while it isn't compiled yet, or can't be."""
        assert exit_layer > 0 or num_drafts == 0
        if self._failed:
            return None
        rows = min(1 << (len(tokens) - 1).bit_length(), cache.keys.shape[1])
        live = max(cache.lengths) + num_drafts + 1
        shape = RoundShape(
            exit_layer=exit_layer,
            num_drafts=num_drafts,
            stop=stop,
            num_rows=rows,
            num_slots=slots_for(live, cache.capacity),
        )
        program = self._program(shape, cache, tokens)
        if program is None:
            return None
        result: list[list[int]] = program.run(tokens, cache.lengths).tolist()
        return result

    def _program(self, shape: RoundShape, cache: KVCache, tokens: Sequence[int]) -> "_Program | None":
        """The round's program, made now if it has been asked for often enough."""
        key = (shape, cache.keys.untyped_storage().data_ptr(), cache.keys.data_ptr())
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            return program
        self.provisional += 1
        if self._uses[key] < self._uses_before:
            self._uses[key] += 1
            return None
        started = time.perf_counter()
        program = _Program(StaticRound(self._parts, shape, cache), self._device)
        problem = None
        try:
            self._prepare(program, tokens, cache.lengths)
        except Exception as error:  # compilers raise nearly anything; a round can be run again by the other verbs
            problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self._failed = True
            self._programs.clear()
            warnings.warn(f"rounds can't be compiled, and run uncompiled: {problem}", RuntimeWarning, stacklevel=2)
        self.report.append(CompiledRound(shape=shape, seconds=time.perf_counter() - started, problem=problem))
        if problem is not None:
            return None
        self._programs[key] = program
        if len(self._programs) > MOST_ROUNDS:
            oldest, _ = self._programs.popitem(last=False)
            del self._uses[oldest]
        return program

    def _prepare(self, program: "_Program", tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Compile and capture, on the inputs of the round that is about to run: run again, it writes the same."""
        if self._mode == "max":
            program.compile()
        if self._device.type == "cuda":
            self._recorder = self._recorder or _Recorder(self._device)
            program.capture(tokens, lengths, self._recorder)
        elif self._mode == "max":
            program.run(tokens, lengths)

    def _allocate(self, num_rows: int, capacity: int) -> KVCache:
        parts = self._parts
        return KVCache(
            parts.config,
            num_rows=num_rows,
            capacity=capacity,
            dtype=parts.dtype,
            device=self._device,
            kept=parts.cache_dtype,
        )

    def _forget(self, address: int) -> None:
        """Give up what was made for buffers that are given up."""
        for key in [key for key in self._programs if key[1] == address]:
            del self._programs[key]
        for key in [key for key in self._uses if key[1] == address]:
            del self._uses[key]


class _Recorder:
    """Stream and memory of all captures: no round runs while another one's intermediates matter."""

    def __init__(self, device: torch.device) -> None:
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


class _Program:
    """One round with its inputs: called, compiled, or captured."""

    def __init__(self, function: StaticRound, device: torch.device) -> None:
        self._function: Callable[[Tensor], Tensor] = function
        self._capacity = function.capacity
        self._device = device
        size, on_cuda = (function.shape.num_rows, 2), device.type == "cuda"
        self._staged = torch.zeros(size, dtype=torch.long, pin_memory=on_cuda)
        self._inputs = torch.zeros(size, dtype=torch.long, device=device) if on_cuda else self._staged
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Tensor | None = None

    def run(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The round of each row's pending token, at the row's committed length: [B, 2K + 1], on the host."""
        self._fill(tokens, lengths)
        if self._graph is None:
            outputs = self._call()
        else:
            assert self._outputs is not None
            self._graph.replay()
            outputs = self._outputs
        return outputs[: len(tokens)].cpu()

    def compile(self) -> None:
        """Hand the function to `torch.compile`, which works when it is first called."""
        self._function = torch.compile(self._function, dynamic=False, fullgraph=True)

    def capture(self, tokens: Sequence[int], lengths: Sequence[int], recorder: _Recorder) -> None:
        """Make a graph of the round, on inputs with which it is about to run."""
        self._fill(tokens, lengths)
        self._graph, self._outputs = recorder.record(self._call)

    def _call(self) -> Tensor:
        if isinstance(self._function, StaticRound):
            return self._function(self._inputs)
        with torch._dynamo.config.patch(
            recompile_limit=MOST_RECOMPILATIONS, accumulated_recompile_limit=MOST_RECOMPILATIONS
        ):
            return self._function(self._inputs)

    def _fill(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy the inputs to where the function reads them.

        Rows of the shape that have no sequence write token 0 into the scratch slot of a cache row that may belong to
        somebody else: nobody reads that slot, and there a query sees numbers only, so that nothing becomes NaN.
        """
        filled = list(zip(tokens, lengths, strict=True))
        filled += [(0, self._capacity)] * (len(self._staged) - len(filled))
        self._staged.copy_(torch.tensor(filled))
        if self._inputs is not self._staged:
            self._inputs.copy_(self._staged, non_blocking=True)
