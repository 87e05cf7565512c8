"""A decoder whose compositions are single calls into compiled code, where these can do what is asked."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, Drafts, Lease, RoundTokens
from layerskip.model.draw import Draw
from layerskip.model.native.arrays import split
from layerskip.model.native.network import NativeNetwork
from layerskip.model.native.rounds import RoundNetworks, run_rounds
from layerskip.model.native.threads import torch_at_rest
from layerskip.model.positions import Positions


class NativeDecoder(Decoder):
    """A `Decoder` over a `NativeNetwork`."""

    def __init__(self, *args: Any, network: NativeNetwork, **options: Any) -> None:
        """Take what `Decoder` takes."""
        super().__init__(*args, network=network, **options)
        self._native = network
        # Capping can turn distinct logits into ties, and the kernels don't cap.
        self._can_choose = self.config.final_logit_softcapping is None

    @property
    def compute(self) -> str:
        """As `Decoder.compute`."""
        return self._native.compute

    @property
    def ragged(self) -> bool:
        """As `Decoder.ragged`."""
        return self._can_choose and self._native.embeds

    def own_threads(self) -> AbstractContextManager[None]:
        """As `Decoder.own_threads`."""
        return torch_at_rest()

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """As `Decoder.new_cache`."""
        with torch_at_rest():  # filling it with zeros would wake torch's threads right before the first prompt
            return super().new_cache(num_rows, capacity)

    def read_rows(self, tokens: Sequence[Sequence[int]], cache: KVCache, num_layers: int) -> list[Tensor]:
        """As `Decoder.read_rows`, without padding."""
        if num_layers in self._adapters:
            return super().read_rows(tokens, cache, num_layers)
        counts = [len(row) for row in tokens]
        self.calls.add(0, num_layers, sum(map(bool, counts)), max(counts))
        hidden = self.embed(torch.tensor([token for row in tokens for token in row]))
        hidden = self._native.run_rows(hidden.contiguous(), cache.lengths, counts, cache, 0, num_layers)
        return list(hidden.split(counts))  # type: ignore[no-untyped-call]

    def choose(
        self,
        inputs: Tensor,
        positions: Positions,
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None = None,
    ) -> Tensor:
        """As `Decoder.choose`."""
        if not self._can_choose or (inputs.dtype == torch.long and not self._native.embeds):
            return super().choose(inputs, positions, cache, start, stop, draw)
        rows, queries = inputs.shape[:2]
        flat = inputs.flatten(0, 1).contiguous()
        if flat.data_ptr() == inputs.data_ptr() and inputs.dtype != torch.long:
            flat = flat.clone()  # states are overwritten
        counts = [queries] * rows
        return self._choose(flat, positions.first, counts, cache, start, stop, draw).view(rows, queries)

    def _choose(
        self,
        inputs: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None,
    ) -> Tensor:
        """As `NativeNetwork.choose`."""
        verifier = self._verifier(stop)
        verifier._count_block(start, stop, counts)
        return verifier._native.choose(inputs, starts, counts, cache, start, stop, draw)

    def _verifier(self, num_layers: int) -> "NativeDecoder":
        """What chooses after so many layers: this decoder, or that of the exit's adapter."""
        decoder = self._adapters.get(num_layers, self)
        assert isinstance(decoder, NativeDecoder)
        return decoder

    def _count_block(self, start: int, stop: int, counts: Sequence[int]) -> None:
        """Count a pass once, by the number of rows and the tokens of the longest."""
        self.calls.add(start, stop, len(counts), max(counts))
        if self._adapter is not None:
            self.calls.add(self._adapter, self._adapter + 1, len(counts), max(counts))

    def _draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest, *, complete: bool) -> Drafts:
        if not self._can_draft(request):
            return super()._draft(tokens, cache, request, complete=complete)
        drafts, hidden, confidences = self._draft_rows(tokens.flatten().tolist(), cache, request, complete=complete)
        found = self.padded(drafts)
        found.exit_layer, found.confidences = request.exit_layer, confidences
        if complete:
            states = hidden.split([length + 1 for length in found.lengths])  # type: ignore[no-untyped-call]
            found.hidden = pad_sequence(list(states), batch_first=True)
        return found

    def _can_draft(self, request: DraftRequest) -> bool:
        """Whether kernels can draft; the most likely draft stays the most likely one under a cap."""
        return self._native.embeds and (self._can_choose or request.draw is None)

    def _draft_rows(
        self, tokens: Sequence[int], cache: KVCache, request: DraftRequest, *, complete: bool
    ) -> tuple[list[list[int]], Tensor, Sequence[Sequence[float]]]:
        """As `NativeNetwork.draft`."""
        found = self._native.draft(tokens, cache, request, complete=complete)
        self._count_passes(found[0], found[2], request.exit_layer, complete=complete)
        return found

    def _count_passes(
        self,
        drafts: Sequence[Sequence[int]],
        confidences: Sequence[Sequence[float]],
        exit_layer: int,
        *,
        complete: bool,
    ) -> None:
        """Count passes of drafting, as if rows that have their drafts took part in the others."""
        longest = max(map(len, drafts))
        drawn = max([longest, *map(len, confidences)])
        passes = drawn + (complete and drawn == longest)
        if self.calls.observer is None:
            self.calls.count += passes * (exit_layer + (self._adapter is not None))
            return
        for _ in range(passes):
            self.calls.add(0, exit_layer, len(drafts), 1)
            if self._adapter is not None:
                self.calls.add(self._adapter, self._adapter + 1, len(drafts), 1)

    def round(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        request: DraftRequest,
        num_layers: int,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> RoundTokens:
        """As `Decoder.round`, without padding: each row's own number of tokens runs through the layers."""
        if drafts is None and self._runs_rounds(request):
            room = [limit + 1 for limit in request.limits(len(tokens))]
            lease = Lease(remaining=room, ends=[()] * len(tokens))
            return self.rounds(tokens, cache, request, num_layers, lease)[0]
        if drafts is None or not self.ragged:
            return super().round(tokens, cache, request, num_layers, drafts)
        start = self.stopwatch.mark()
        counts = [len(row) + 1 for row in drafts]
        flat = torch.tensor([token for last, row in zip(tokens, drafts, strict=True) for token in (last, *row)])
        chosen = self._choose(flat, cache.lengths, counts, cache, 0, num_layers, request.draw)
        return RoundTokens(
            drafts=drafts,
            targets=split(chosen.tolist(), counts),
            seconds_verifying=self.stopwatch.between(start, self.stopwatch.mark()),
        )

    def rounds(
        self, tokens: Sequence[int], cache: KVCache, request: DraftRequest, num_layers: int, lease: Lease
    ) -> list[RoundTokens]:
        """As `Decoder.rounds`, in one call."""
        if not self._runs_rounds(request):
            return super().rounds(tokens, cache, request, num_layers, lease)
        drafter, verifier = self.drafter(request.exit_layer), self._verifier(num_layers)
        assert isinstance(drafter.decoder, NativeDecoder)
        networks = RoundNetworks(
            verifier=verifier._native, drafter=drafter.decoder._native, shares_states=drafter.shares_states
        )
        done = run_rounds(networks, tokens, cache, request, num_layers, lease)
        for round_ in done:
            counts, first = [len(targets) for targets in round_.targets], 0
            if max(map(len, round_.confidences or round_.drafts)):  # there are no passes without drafts
                drafter.decoder._count_passes(
                    round_.drafts, round_.confidences, request.exit_layer, complete=drafter.shares_states
                )
                first = request.exit_layer if drafter.shares_states else 0
            verifier._count_block(first, num_layers, counts)
        return done

    def _runs_rounds(self, request: DraftRequest) -> bool:
        """Whether kernels can run whole rounds."""
        drafter = self.drafter(request.exit_layer).decoder
        return self.ragged and isinstance(drafter, NativeDecoder) and drafter._can_draft(request)
