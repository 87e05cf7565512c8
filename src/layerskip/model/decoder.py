"""The network: three primitives, and compositions of them.

    hidden = decoder.embed(tokens)
    hidden = decoder.run_layers(hidden, positions, cache, start, stop)
    logits = decoder.unembed(hidden)

At an exit that has an adapter, the state passes through that before norm and head:

    state = decoder.adapt(hidden, positions, cache, exit_layer)
    logits = decoder.unembed(state, exit_layer)

Native kernels and CUDA graphs run the compositions in fewer calls:

    tokens = decoder.choose(inputs, positions, cache, start, stop, draw)
    drafts = decoder.draft(tokens, cache, request)
    round_ = decoder.round(tokens, cache, request, num_layers)
    rounds = decoder.rounds(tokens, cache, request, num_layers, lease)

Shapes: B rows, Q query tokens a row, K drafts a row, D width, V vocabulary, L layers, E exit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.drafts import DraftCounts, DraftRequest, Drafts, Lease, RoundTokens
from layerskip.model.draw import Draw
from layerskip.model.positions import Positions, ValueSource
from layerskip.model.primitives import Primitives


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """What drafts at an exit."""

    decoder: "Decoder"
    num_layers: int
    """The deepest exit."""
    shares_states: bool
    """Whether its hidden states, keys and values are the network's own, so that verification goes on from them."""


class Decoder(Primitives):
    """A decoder-only transformer of any supported family."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what `Primitives` takes."""
        super().__init__(*args, **options)
        self._drafter: Drafter | None = None
        self._adapted_drafters: dict[int, Drafter] = {}

    @property
    def provisional_rounds(self) -> int:
        """Rounds so far that took longer than the same ones will, once they are compiled."""
        return 0

    @property
    def round_kind(self) -> str:
        """What rounds are made of: `calls`; or `graphs` or `max` where they are captured or compiled."""
        return "calls"

    @property
    def ragged(self) -> bool:
        """Whether rounds run without padding: rows may have different numbers of tokens."""
        return False

    def set_drafter(self, decoder: "Decoder", *, num_layers: int, shares_states: bool) -> None:
        """Let another decoder draft, at exits up to `num_layers`; it shares this one's caches and counter of layers."""
        assert decoder.calls is self.calls
        self._drafter = Drafter(decoder=decoder, num_layers=num_layers, shares_states=shares_states)

    def set_adapter(self, exit_layer: int, decoder: "Decoder", quantized: "Decoder | None" = None) -> None:
        """Give an exit an adapter.

        Args:
            exit_layer: E.
            decoder: This network's layers with the adapter, its norm and its head.
            quantized: The same with the layers of fewer bits that draft, where there are such.
        """
        self._adapters[exit_layer] = decoder
        decoder._adapters = self._adapters  # whose states a probe may ask for while it drafts
        drafts = decoder if quantized is None else quantized
        drafts._adapters = self._adapters
        self._adapted_drafters[exit_layer] = Drafter(
            decoder=drafts, num_layers=exit_layer, shares_states=quantized is None
        )

    @property
    def adapted_exits(self) -> tuple[int, ...]:
        """Exits that have an adapter, ascending."""
        return tuple(sorted(self._adapters))

    def drafter(self, exit_layer: int) -> Drafter:
        """What drafts at an exit."""
        if exit_layer in self._adapted_drafters:
            return self._adapted_drafters[exit_layer]
        if self._drafter is not None and exit_layer <= self._drafter.num_layers:
            return self._drafter
        return Drafter(decoder=self, num_layers=self.num_layers, shares_states=True)

    def read_rows(self, tokens: Sequence[Sequence[int]], cache: KVCache, num_layers: int) -> list[Tensor]:
        """Run the next tokens of each row's text, and write their keys and values. Nothing is committed.

        Rows are padded on the right: what padding writes lies beyond a row's tokens, is never attended to, and is
        overwritten by the tokens that come.

        Args:
            tokens: Of each of B rows, after what its row of the cache has committed; rows without any take no part.
            cache: Holds the committed tokens of the rows.
            num_layers: Layers to run, from the first on.

        Returns:
            Of each row [its tokens, D], what norm and head read.
        """
        longest = max(map(len, tokens))
        block = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=self.device)
        positions = self.place(cache, cache.lengths, longest)
        hidden = self.run_layers(self.embed(block), positions, cache, 0, num_layers)
        hidden = self.adapt(hidden, positions, cache, num_layers, ValueSource.NONE)
        return [states[: len(row)] for states, row in zip(hidden, tokens, strict=True)]

    def run_exits(
        self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int, exits: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`run_layers`, keeping the states of the exits on the way too: those above `start`, up to `stop`.

        Returns:
            The output of layer `stop - 1`, and by exit [B, Q, D], the state that `adapt` gives.
        """
        states = {}
        for exit_layer in sorted(exit_ for exit_ in exits if start < exit_ <= stop):
            hidden = self.run_layers(hidden, positions, cache, start, exit_layer)
            states[exit_layer], start = hidden, exit_layer
        hidden = self.run_layers(hidden, positions, cache, start, stop)
        # Adapters come last: they may read values that the last layers have only now written.
        source = ValueSource.BEFORE if stop == self.num_layers else ValueSource.COMMITTED
        return hidden, {
            exit_layer: self.adapt(state, positions, cache, exit_layer, source) for exit_layer, state in states.items()
        }

    def depth_for(self, exits: Collection[int]) -> int:
        """Layers to run over a text for the states at some exits: all where an adapter reads what later ones keep."""
        return self.num_layers if any(exit_layer in self._adapters for exit_layer in exits) else max(exits)

    def choose(
        self,
        inputs: Tensor,
        positions: Positions,
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None = None,
    ) -> Tensor:
        """The token after each of a block.

        Args:
            inputs: [B, Q] token ids, with `start` 0; or [B, Q, D], the input of layer `start`.
            positions: Where the tokens stand, from `place`.
            cache: As for `run_layers`.
            start: First layer, from 0.
            stop: One past the last layer.
            draw: How to choose; the most likely token if not given.

        Returns:
            [B, Q] token ids; `NO_TOKEN` where no logit is a finite number.
        """
        hidden = self.embed(inputs) if inputs.dtype == torch.long else inputs
        hidden = self.run_layers(hidden, positions, cache, start, stop)
        state = self.adapt(hidden, positions, cache, stop, ValueSource.NONE)
        return self.pick(state, draw, [first + 1 for first in positions.first], exit_layer=stop)[0]

    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest) -> Drafts:
        """Draft tokens with the first layers. Nothing is committed to the cache.

        The last draft runs through the first layers too, without the head: verification needs its hidden state. Not so
        where other weights draft: what they leave in the cache is overwritten by verification, which then begins with
        the embedding.

        Args:
            tokens: [B, 1], the last token of each row, right after what its row of the cache has committed.
            cache: Holds the committed tokens of the rows.
            request: What to draft; at least one token.
        """
        drafter = self.drafter(request.exit_layer)
        drafts = drafter.decoder._draft(tokens, cache, request, complete=drafter.shares_states)
        if not drafter.shares_states:
            drafts.exit_layer, drafts.hidden = 0, None
        return drafts

    def _draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest, *, complete: bool) -> Drafts:
        """`draft` with this network's own layers; `complete`: run the last draft through the layers too."""
        first, exit_layer = cache.lengths, request.exit_layer
        drafts = [tokens[:, :0]]
        hidden: list[Tensor] = []
        counts = DraftCounts(request.limits(len(first)), request.stop)
        while counts.goes_on:
            at = [length + len(hidden) for length in first]
            positions = self.place(cache, at, 1)
            hidden.append(self.run_layers(self.embed(tokens), positions, cache, 0, exit_layer))
            state = self.read(hidden[-1], positions, cache)
            after = [position + 1 for position in at]
            tokens, probs = self.pick(state, request.draw, after, confident=request.stop is not None)
            drafts.append(tokens)
            counts.add(() if probs is None else probs.flatten().tolist())
        longest = max(counts.counts)
        if complete and longest == len(hidden):
            positions = self.place(cache, [length + longest for length in first], 1)
            hidden.append(self.run_layers(self.embed(tokens), positions, cache, 0, exit_layer))
            self.write_adapter_keys(hidden[-1], positions, cache)
        return Drafts(
            tokens=torch.cat(drafts[: longest + 1], 1),
            lengths=counts.counts,
            exit_layer=exit_layer,
            hidden=torch.cat(hidden, 1) if hidden else None,
            confidences=counts.confidences if request.stop is not None else (),
        )

    def round(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        request: DraftRequest,
        num_layers: int,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> RoundTokens:
        """Draft with the first layers and verify with the others; without drafts, an autoregressive step.

        Args:
            tokens: B token ids, the last of each row, right after what its row of the cache has committed.
            cache: Nothing is committed. Drafts for which a row has no room go to the scratch slot; they, and the
                targets after them, mean nothing.
            request: What to draft, and how tokens are chosen.
            num_layers: Layers in all; fewer than L for early exit, without drafts.
            drafts: Each row's drafts from elsewhere, in place of the first layers'.
        """
        start = self.stopwatch.mark()
        pending = self.pending(tokens)
        found: Drafts | None = None
        if drafts is not None:
            found = self.padded(drafts)
        elif request.exit_layer and request.num_drafts:
            found = self.draft(pending, cache, request)
        middle = self.stopwatch.mark()
        if found is None:  # a step: every operator between two passes counts
            positions = self.place(cache, cache.lengths, 1)
            chosen = self.choose(pending, positions, cache, 0, num_layers, request.draw).tolist()
            return RoundTokens(
                drafts=[[] for _ in chosen],
                targets=chosen,
                seconds_verifying=self.stopwatch.between(middle, self.stopwatch.mark()),
            )
        length = found.tokens.shape[1]
        inputs = torch.cat((pending, found.tokens), 1) if found.hidden is None else found.hidden
        positions = self.place(cache, cache.lengths, inputs.shape[1])
        targets = self.choose(inputs, positions, cache, found.exit_layer, num_layers, request.draw)
        both = torch.cat((found.tokens, targets), 1).tolist()  # the round's only device synchronisation
        end = self.stopwatch.mark()
        return RoundTokens(
            drafts=[row[:number] for row, number in zip(both, found.lengths, strict=True)],
            targets=[row[length:] for row in both],
            confidences=found.confidences,
            seconds_drafting=self.stopwatch.between(start, middle) if length else 0.0,
            seconds_verifying=self.stopwatch.between(middle, end),
        )

    def rounds(
        self, tokens: Sequence[int], cache: KVCache, request: DraftRequest, num_layers: int, lease: Lease
    ) -> list[RoundTokens]:
        """Rounds one after the other, each after the tokens that the one before has given; nothing is committed.

        Args:
            tokens: As for `round`.
            cache: As for `round`; has room for all tokens that the lease allows.
            request: What to draft in each round; rows draft no more than they may still gain, less one.
            num_layers: As for `round`.
            lease: When to stop.

        Returns:
            At least one; no more than that where a round isn't a single call.
        """
        return [self.round(tokens, cache, request, num_layers)]

    def padded(self, drafts: Sequence[Sequence[int]]) -> Drafts:
        """Drafts of each row as a rectangle on the device."""
        longest = max(map(len, drafts))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in drafts], device=self.device)
        return Drafts(tokens=tokens.view(len(drafts), longest).long(), lengths=[len(row) for row in drafts])

    def pending(self, tokens: Sequence[int]) -> Tensor:
        """Token ids of B rows as [B, 1] on the device."""
        return torch.tensor([[token] for token in tokens], device=self.device)
