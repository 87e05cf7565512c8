"""A decoder whose rounds run as CUDA graphs or compiled functions, once these are made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, Drafts, RoundTokens
from layerskip.model.draw import Draw
from layerskip.model.graphs.compiled import CompiledRound, CompiledRounds, RoundMode
from layerskip.model.graphs.static import AdaptedExit, RoundParts
from layerskip.model.positions import Positions
from layerskip.model.torch.network import TorchNetwork


class GraphDecoder(Decoder):
    """A `Decoder` over a `TorchNetwork`, with compiled rounds."""

    def __init__(
        self, *args: Any, network: TorchNetwork, rounds: RoundMode, uses_before: int | None = None, **options: Any
    ) -> None:
        """Take what `Decoder` takes, and how to run rounds.

        Args:
            *args: As for `Decoder`.
            network: Layers and head.
            rounds: How whole rounds run.
            uses_before: Times that a round runs uncompiled before it is compiled (`CompiledRounds`).
            **options: As for `Decoder`.
        """
        super().__init__(*args, network=network, **options)
        parts = RoundParts(
            config=self.config,
            network=network,
            embed=self.embed,
            unembed=self.unembed,
            ropes=self._ropes,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
        )
        self._parts = parts
        self._apart = True
        self._rounds = CompiledRounds(
            parts, rounds, device=self.device, max_context=self.max_context, uses_before=uses_before
        )

    def set_adapter(self, exit_layer: int, decoder: Decoder, quantized: Decoder | None = None) -> None:
        """As `Decoder.set_adapter`; rounds draft through it unless other layers draft."""
        super().set_adapter(exit_layer, decoder, quantized)
        layer = self.config.adapter_at(exit_layer)
        assert layer is not None
        self._parts.adapters[exit_layer] = AdaptedExit(layer=layer, unembed=decoder.unembed)

    @property
    def compiled(self) -> tuple[CompiledRound, ...]:
        """Rounds that were compiled or captured so far, with the seconds that this took."""
        return tuple(self._rounds.report)

    @property
    def provisional_rounds(self) -> int:
        """Rounds so far that took longer than the same ones will, once they are compiled."""
        return self._rounds.provisional

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache in buffers that earlier ones may have used: rounds are compiled for these."""
        return self._rounds.new_cache(num_rows, capacity)

    @property
    def round_kind(self) -> str:
        """As `Decoder.round_kind`: `graphs` or `max`, unless they have failed."""
        return super().round_kind if self._rounds.failed else self._rounds.mode

    def choose(
        self,
        inputs: Tensor,
        positions: Positions,
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None = None,
    ) -> Tensor:
        """As `Decoder.choose`, in one call where that is compiled."""
        found = None
        if self._apart and self._rounds.can_draw(draw):
            found = self._rounds.choose(inputs, positions.first, cache, start, stop, draw)
        if found is None:
            return super().choose(inputs, positions, cache, start, stop, draw)
        self._count(start, stop, *inputs.shape[:2])
        return found

    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest) -> Drafts:
        """As `Decoder.draft`, in one call for each draft where that is compiled.

        What is returned stays as it is until the next drafts are made.
        """
        found = None
        if self._apart and self._is_drafter(request.exit_layer) and self._rounds.can_draw(request.draw):
            found = self._rounds.draft(tokens, cache, request)
        if found is None:
            return super().draft(tokens, cache, request)
        assert found.hidden is not None
        for _ in range(found.hidden.shape[1]):
            self._count(0, request.exit_layer, len(tokens), 1)
        return found

    def round(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        request: DraftRequest,
        num_layers: int,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> RoundTokens:
        """As `Decoder.round`, in one call where drafts are of a fixed number, and that is compiled.

        Otherwise `draft` and `choose` are compiled apart.
        """
        exit_layer, planned = request.exit_layer, max(request.planned, request.num_drafts)
        useful = 2 * request.num_drafts >= planned  # otherwise rows end soon, and most of the drafts would be in vain
        fixed = request.stop is None and drafts is None
        own = exit_layer == 0 or self._is_drafter(exit_layer)
        if not (own and useful and fixed and self._rounds.can_draw(request.draw)):
            return super().round(tokens, cache, request, num_layers, drafts)
        start = self.stopwatch.mark()
        result = self._rounds.run(
            tokens, cache, exit_layer=exit_layer, num_drafts=planned, stop=num_layers, draw=request.draw
        )
        if result is None:
            with self._in_calls():
                return super().round(tokens, cache, request, num_layers)
        seconds = self.stopwatch.between(start, self.stopwatch.mark())
        for _ in range(planned + 1 if exit_layer else 0):
            self._count(0, exit_layer, len(tokens), 1)
        self._count(exit_layer, num_layers, len(tokens), planned + 1)
        # A graph is one call, in which nothing can be timed: its seconds are split by the layers entered.
        share = (planned + 1) * exit_layer / (planned * exit_layer + num_layers) if planned else 0.0
        return RoundTokens(
            drafts=[row[:planned] for row in result],
            targets=[row[planned:] for row in result],
            seconds_drafting=share * seconds,
            seconds_verifying=(1 - share) * seconds,
        )

    def _is_drafter(self, exit_layer: int) -> bool:
        """Whether this network's own layers draft at an exit, through its adapter if it has one."""
        drafter = self.drafter(exit_layer)
        return drafter.decoder is self or (drafter.shares_states and exit_layer in self._parts.adapters)

    def _count(self, start: int, stop: int, num_rows: int, num_queries: int) -> None:
        """Count layers start..stop-1, and the adapter after them."""
        if start < stop:
            self.calls.add(start, stop, num_rows, num_queries)
        adapter = self.config.adapter_at(stop)
        if adapter is not None:
            self.calls.add(adapter, adapter + 1, num_rows, num_queries)

    @contextmanager
    def _in_calls(self) -> Iterator[None]:
        """Meanwhile no part of a round is compiled: the whole round will be."""
        self._apart = False
        try:
            yield
        finally:
            self._apart = True
