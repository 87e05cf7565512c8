"""A decoder whose greedy rounds run as CUDA graphs or compiled functions, once these are made."""

from collections.abc import Sequence
from typing import Any

from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, RoundTokens
from layerskip.model.graphs.compiled import CompiledRound, CompiledRounds, RoundMode
from layerskip.model.graphs.static import AdaptedExit, RoundParts
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

    def round(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        request: DraftRequest,
        num_layers: int,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> RoundTokens:
        """As `Decoder.round`, in one call where the round is greedy, of a fixed length, and compiled."""
        exit_layer, planned = request.exit_layer, max(request.planned, request.num_drafts)
        drafter = self.drafter(exit_layer).decoder
        own = exit_layer == 0 or drafter is self or drafter is self._adapters.get(exit_layer)
        own = own and num_layers not in self._adapters
        useful = 2 * request.num_drafts >= planned  # otherwise rows end soon, and most of the drafts would be in vain
        greedy = request.draw is None and request.stop is None
        if not (own and useful and greedy and drafts is None):
            return super().round(tokens, cache, request, num_layers, drafts)
        start = self.stopwatch.mark()
        result = self._rounds.run(tokens, cache, exit_layer=exit_layer, num_drafts=planned, stop=num_layers)
        if result is None:
            return super().round(tokens, cache, request, num_layers)
        seconds = self.stopwatch.between(start, self.stopwatch.mark())
        adapter = self.config.adapter_at(exit_layer)
        for _ in range(planned + 1 if exit_layer else 0):
            self.calls.add(0, exit_layer, len(tokens), 1)
            if adapter is not None:
                self.calls.add(adapter, adapter + 1, len(tokens), 1)
        self.calls.add(exit_layer, num_layers, len(tokens), planned + 1)
        # A graph is one call, in which nothing can be timed: its seconds are split by the layers entered.
        share = (planned + 1) * exit_layer / (planned * exit_layer + num_layers) if planned else 0.0
        return RoundTokens(
            drafts=[row[:planned] for row in result],
            targets=[row[planned:] for row in result],
            seconds_drafting=share * seconds,
            seconds_verifying=(1 - share) * seconds,
        )
