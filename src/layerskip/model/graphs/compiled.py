"""Rounds without the host: captured as CUDA graphs, or compiled, and kept for the next round.

On CUDA a round is hundreds of small kernels, and starting them from Python takes longer than running them. A graph
starts them all at once. What is captured belongs to one shape (`static.RoundShape`) and one pair of buffers.

Shapes: B rows, Q tokens a row, K drafts a row, D width, S slots that attention reads.
"""

import os
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.drafts import DraftRequest, Drafts
from layerskip.model.draw import Draw
from layerskip.model.graphs.cache_pool import CachePool
from layerskip.model.graphs.drafting import DraftState, StaticDraft
from layerskip.model.graphs.program import Program, Recorder
from layerskip.model.graphs.rows import RowInputs, draws_of
from layerskip.model.graphs.static import RoundParts, RoundShape, StaticPart, StaticPass, StaticRound, slots_for

RoundMode = Literal["graphs", "max"]
"""`graphs`: captured on CUDA, called as they are on a CPU. `max`: whole rounds are compiled by `torch.compile`, and on
CUDA captured like all else."""
MOST_ROUNDS = 64
"""Functions that are kept; those unused for longest go first."""
USES_BEFORE = 3
"""Times that a function runs uncompiled before it is captured, which takes as long as a handful of rounds."""
MOST_QUERIES = 64
"""Tokens of each row in a pass that is captured, at most: longer ones seldom come again."""
LEAST_DRAFTS = 15
"""Room for drafts that may stop early: one graph serves all lengths up to it, and the next ones twice as many."""


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
    """A function that was compiled or captured."""

    shape: RoundShape
    seconds: float
    """Time that it took, warm-up included."""
    problem: str | None = None
    """Why it failed; rounds run uncompiled then."""


class CompiledRounds:
    """Runs rounds and their parts, compiling each when it has been asked for often enough."""

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
            uses_before: Times that a function runs uncompiled before it is compiled; `USES_BEFORE` if not given.
        """
        self.report: list[CompiledRound] = []
        self.provisional = 0
        """Rounds that took longer than the same ones will later: not compiled yet, or compiled on the way."""
        self.failed = False
        """Whether nothing can be compiled, so that everything runs without."""
        self.mode = mode
        self._parts, self._device = parts, device
        self._uses_before = USES_BEFORE if uses_before is None else uses_before
        self._programs: OrderedDict[Key, Program] = OrderedDict()
        self._uses: Counter[Key] = Counter()
        self._inputs: dict[int, RowInputs] = {}
        self._states: dict[tuple[int, int], DraftState] = {}
        """By rows, and drafts at most."""
        self._recorder: Recorder | None = None
        self._caches = CachePool(self._allocate, max_context, self._forget)

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache whose buffers may have served other texts, for which rounds are compiled already."""
        return self._caches.take(num_rows, capacity)

    def can_draw(self, draw: Draw | None) -> bool:
        """Whether tokens are chosen as everywhere else on the device.

        On a CPU the noise of compiled kernels is rounded otherwise than torch's, so what torch.compile makes there
        draws nothing.
        """
        return draws_of(draw) == "no" or self._has_parts

    @torch.inference_mode()
    def run(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        *,
        exit_layer: int,
        num_drafts: int,
        stop: int,
        draw: Draw | None = None,
    ) -> list[list[int]] | None:
        """A round's drafts and targets, B x (2K + 1) token ids; None while it isn't compiled yet, or can't be."""
        assert exit_layer > 0 or num_drafts == 0
        shape = self._shape(
            cache, cache.lengths, exit_layer=exit_layer, num_drafts=num_drafts, stop=stop, draws=draws_of(draw)
        )
        self._fill(shape, cache, tokens, cache.lengths, draw=draw)
        program = self._program(shape, cache)
        if program is None:
            return None
        result: list[list[int]] = program.run()[: len(tokens)].tolist()
        return result

    @torch.inference_mode()
    def choose(
        self, inputs: Tensor, first: Sequence[int], cache: KVCache, start: int, stop: int, draw: Draw | None
    ) -> Tensor | None:
        """As `Decoder.choose`, of blocks that begin at `first`; None as for `run`, and for long ones."""
        number, queries = inputs.shape[:2]
        if not self._has_parts or queries > MOST_QUERIES or (start == 0) != (inputs.dtype == torch.long):
            return None
        shape = self._shape(
            cache, first, kind="pass", exit_layer=start, num_drafts=queries - 1, stop=stop, draws=draws_of(draw)
        )
        self._fill(shape, cache, [0] * number, first, draw=draw)
        program = self._program(shape, cache)
        if program is None:
            return None
        assert isinstance(program.part, StaticPass)
        program.part.block[:number] = inputs
        return program.run()[:number].clone()

    @torch.inference_mode()
    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest) -> Drafts | None:
        """As `Decoder.draft`, with the first layers' own states; None as for `run`.

        Without a rule to stop by, all drafts are started at once. With one, the host asks after each.
        """
        if not self._has_parts:
            return None
        most = LEAST_DRAFTS
        while most < request.num_drafts:
            most = 2 * most + 1
        sizes = {"exit_layer": request.exit_layer, "num_drafts": most, "stop": request.exit_layer}
        draws, asks, live = draws_of(request.draw), request.stop is not None, request.num_drafts + 1
        shape = self._shape(cache, cache.lengths, kind="draft", live=live, draws=draws, asks=asks, **sizes)
        limits = request.limits(cache.num_rows)
        self._fill(shape, cache, tokens, cache.lengths, draw=request.draw, stop=request.stop, limits=limits)
        program = self._program(shape, cache)
        last = self._shape(cache, cache.lengths, kind="last", live=live, **sizes)
        finish = None if program is None else self._program(last, cache, at_once=True)
        if program is None or finish is None:
            return None
        state = self._state(shape)
        state.step.zero_()  # compiling has made drafts of its own
        counts, confidences, passes = _draft_on(program, limits, asks=asks)
        longest = max(counts)
        if longest == passes:
            finish.run()
            passes += 1
        return Drafts(
            tokens=state.tokens[: cache.num_rows, :longest],
            lengths=counts,
            exit_layer=request.exit_layer,
            hidden=state.states[: cache.num_rows, : longest + 1],
            confidences=confidences,
        )

    @property
    def _has_parts(self) -> bool:
        """Whether parts of rounds gain anything: torch.compile doesn't take them, and a CPU has no graphs."""
        return self.mode == "graphs" or self._device.type == "cuda"

    def _shape(
        self, cache: KVCache, first: Sequence[int], *, num_drafts: int, live: int | None = None, **facts: Any
    ) -> RoundShape:
        """The shape of a function over `live` tokens a row, K + 1 if not given, that begin at `first`."""
        longest = max(first) + (num_drafts + 1 if live is None else live)
        return RoundShape(
            num_drafts=num_drafts,
            num_rows=min(1 << (len(first) - 1).bit_length(), cache.keys.shape[1]),
            num_slots=slots_for(longest, cache.capacity),
            **facts,
        )

    def _fill(
        self, shape: RoundShape, cache: KVCache, tokens: Sequence[int] | Tensor, first: Sequence[int], **rules: Any
    ) -> None:
        """Tell what runs next of its rows, unless nothing of this shape will."""
        if self.failed:
            return
        if shape.num_rows not in self._inputs:
            self._inputs[shape.num_rows] = RowInputs(shape.num_rows, self._device)
        self._inputs[shape.num_rows].fill(tokens, first, cache.capacity, **rules)

    def _program(self, shape: RoundShape, cache: KVCache, *, at_once: bool = False) -> Program | None:
        """A program whose inputs are filled, made now if it has been asked for often enough, or `at_once`."""
        if self.failed:
            return None
        key = (shape, cache.keys.untyped_storage().data_ptr(), cache.keys.data_ptr())
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            return program
        self.provisional += 1
        if self._uses[key] < self._uses_before and not at_once:
            self._uses[key] += 1
            return None
        started = time.perf_counter()
        program = Program(self._part(shape, cache), self._inputs[shape.num_rows])
        problem = None
        try:
            self._prepare(program)
        except Exception as error:  # compilers raise nearly anything; a round can be run again by the other verbs
            problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.failed = True
            self._programs.clear()
            warnings.warn(f"rounds can't be compiled, and run uncompiled: {problem}", RuntimeWarning, stacklevel=2)
        self.report.append(CompiledRound(shape=shape, seconds=time.perf_counter() - started, problem=problem))
        if problem is not None:
            return None
        self._programs[key] = program
        if len(self._programs) > MOST_ROUNDS:
            oldest, _ = self._programs.popitem(last=False)
            self._uses.pop(oldest, None)
        return program

    def _part(self, shape: RoundShape, cache: KVCache) -> StaticPart:
        """The function of a shape."""
        match shape.kind:
            case "round":
                return StaticRound(self._parts, shape, cache)
            case "pass":
                return StaticPass(self._parts, shape, cache)
            case _:
                return StaticDraft(self._parts, shape, cache, self._state(shape))

    def _state(self, shape: RoundShape) -> DraftState:
        """What drafts of a shape keep from one to the next."""
        size = shape.num_rows, shape.num_drafts
        if size not in self._states:
            parts = self._parts
            self._states[size] = DraftState(*size, parts.config.hidden_size, parts.dtype, self._device)
        return self._states[size]

    def _prepare(self, program: Program) -> None:
        """Compile and capture, on the inputs of the round that is about to run: run again, it writes the same.

        Parts are captured as they are: there are more of them, and torch.compile takes a minute for each.
        """
        if self.mode == "max" and program.part.shape.kind == "round":
            program.compile()
        if self._device.type == "cuda":
            self._recorder = self._recorder or Recorder(self._device)
            program.capture(self._recorder)
        elif self.mode == "max":
            program.run()

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


def _draft_on(
    program: Program, limits: Sequence[int], *, asks: bool
) -> tuple[list[int], list[list[float]] | tuple[()], int]:
    """Make draft after draft; returns each row's number of them, their confidences, and the passes made."""
    if not asks:
        for _ in range(max(limits)):
            program.run()
        return list(limits), (), max(limits)
    counts, confidences = [0] * len(limits), [list[float]() for _ in limits]
    still_open, passes = [limit > 0 for limit in limits], 0
    while any(still_open):
        told = program.run()[: len(limits)].tolist()  # the host waits here
        passes += 1
        for row, (goes_on, count, confidence) in enumerate(told):
            if still_open[row]:
                confidences[row].append(confidence)
                counts[row], still_open[row] = int(count), goes_on > 0
    return counts, confidences, passes
