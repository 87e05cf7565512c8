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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.cache import KVCache, cache_bytes, token_bytes
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.drafts import DraftCounts, DraftRequest, Drafts, Lease, RoundTokens
from layerskip.model.draw import Draw
from layerskip.model.finite import check_finite
from layerskip.model.network import Network
from layerskip.model.positions import Positions, ValueSource
from layerskip.model.rope import RopeTable
from layerskip.model.sampling import Vocabulary, WholeVocabulary, choose_among
from layerskip.model.stopwatch import Stopwatch


@dataclass
class LayerCalls:
    """Layers entered, and who wants to hear of them."""

    count: int = 0
    observer: Callable[[int, int, int, int], None] | None = None
    """Called with start, stop, B and Q when layers start..stop-1 run over a block [B, Q]."""

    def add(self, start: int, stop: int, num_rows: int, num_queries: int) -> None:
        """Count layers start..stop-1, once whatever the block's rows and tokens."""
        self.count += stop - start
        if self.observer is not None:
            self.observer(start, stop, num_rows, num_queries)


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """What drafts at an exit."""

    decoder: "Decoder"
    num_layers: int
    """The deepest exit."""
    shares_states: bool
    """Whether its hidden states, keys and values are the network's own, so that verification goes on from them."""


class Decoder:
    """A decoder-only transformer of any supported family."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor | BlockWeight,
        network: Network,
        ropes: Mapping[str, RopeTable],
        dtype: torch.dtype,
        device: torch.device,
        max_context: int,
        token_ids: Tensor | None = None,
        adapter: int | None = None,
        calls: LayerCalls | None = None,
        own: ModelConfig | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Put a network together from loaded weights (`checkpoint.loading.network.load_decoder` does that).

        Args:
            config: Sizes and switches.
            embedding: [V, D], in any floating dtype or in blocks.
            network: Layers and head.
            ropes: Rotary table of each kind of layer.
            dtype: Dtype of hidden states.
            device: Where everything lives.
            max_context: Longest sequence in tokens that may be run.
            token_ids: [N] ids of the head's outputs, where it has some only.
            adapter: The layer that adapts what the head reads, for a decoder that drafts at the exit of an adapter.
            calls: Counts the layers entered, also those of another decoder; a counter of its own if not given.
            own: Sizes of the weights and the cache, where this process has a part of the network only.
            cache_dtype: Dtype that keys and values are kept in (`KVCache`); `dtype` if not given.
        """
        self.config = config
        self._own = self._cache_config = own or config
        self.dtype = dtype
        self.cache_dtype = cache_dtype or dtype
        """Dtype that keys and values are kept in."""
        self.device = device
        self.max_context = max_context
        self.stopwatch = Stopwatch(device)
        self.calls = calls or LayerCalls()
        """Layers entered so far, those of drafts included."""
        self._token_ids = token_ids
        self._adapter = adapter
        self._drafter: Drafter | None = None
        self._adapters: dict[int, Decoder] = {}
        self._adapted_drafters: dict[int, Drafter] = {}
        self._embedding = embedding
        self._network = network
        self._ropes = ropes
        self._multiplier = torch.tensor(config.embedding_multiplier, dtype=dtype).item()

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    @property
    def num_ranks(self) -> int:
        """Processes that share the network."""
        return 1

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that `own_logits` are of."""
        return WholeVocabulary(self.config.vocab_size)

    def common(self, number: int) -> int:
        """The same number, from 0 to 2^63 - 1, in all processes that share the network."""
        return number

    @property
    def provisional_rounds(self) -> int:
        """Rounds so far that took longer than the same ones will, once they are compiled."""
        return 0

    @property
    def kernels(self) -> str:
        """What computes: `native` or `torch`."""
        return self._network.kernels

    @property
    def round_kind(self) -> str:
        """What rounds are made of: `calls`; or `graphs` or `max` where they are captured or compiled."""
        return "calls"

    @property
    def compute(self) -> str:
        """The numbers that products multiply by: those of `dtype`, or what `LoadingConfig.compute` rounds inputs to."""
        return str(self.dtype).removeprefix("torch.")

    def weight_bytes(self, start: int, stop: int, *, head: bool = True) -> int:
        """Bytes of weights that a pass through layers start..stop-1, and the head, reads."""
        layers = sum(layer.num_bytes for layer in self._network.layers[start:stop])
        return layers + (self._network.head.num_bytes if head else 0)

    def adapter_bytes(self) -> int:
        """Bytes of weights that this decoder's own adapter and the head after it read."""
        first = self.num_layers if self._adapter is None else self._adapter
        return self.weight_bytes(first, first + (self._adapter is not None))

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token, in all layers."""
        return token_bytes(self._cache_config, self.cache_dtype)

    @property
    def ragged(self) -> bool:
        """Whether rounds run without padding: rows may have different numbers of tokens."""
        return False

    @property
    def layer_calls(self) -> int:
        """Layers entered so far, while drafting too, each counted once a call whatever its rows and tokens."""
        return self.calls.count

    def own_threads(self) -> AbstractContextManager[None]:
        """While rounds run: whatever threads would disturb those of this network rest."""
        return nullcontext()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Layers entered meanwhile are neither counted nor observed."""
        calls, count, observer = self.calls, self.calls.count, self.calls.observer
        calls.observer = None
        try:
            yield
        finally:
            calls.count, calls.observer = count, observer

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

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache of `num_rows` rows of at least `capacity` tokens for this network."""
        return KVCache(
            self._cache_config,
            num_rows=num_rows,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            kept=self.cache_dtype,
        )

    def cache_bytes(self, num_rows: int, capacity: int) -> int:
        """Bytes of such a cache."""
        return cache_bytes(self._cache_config, num_rows, capacity, self.cache_dtype)

    def place(self, cache: KVCache, first: Sequence[int], num_queries: int) -> Positions:
        """Positions for Q consecutive tokens in each row, row b starting at `first[b]`."""
        return Positions(self._own, self._ropes, cache, first, num_queries, self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, Q] token ids -> [B, Q, D]. What follows `NO_TOKEN` means nothing, but it must not stop a device."""
        tokens = tokens.clamp(min=0)
        if isinstance(self._embedding, BlockWeight):
            hidden = self._embedding.rows(tokens.flatten()).dequantize().view(*tokens.shape, -1).to(self.dtype)
        else:
            hidden = F.embedding(tokens, self._embedding).to(self.dtype)
        return hidden if self._multiplier == 1.0 else hidden * self._multiplier

    def run_layers(self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int) -> Tensor:
        """Run layers start..stop-1, writing their keys and values into the cache.

        Args:
            hidden: [B, Q, D], the input of layer `start`.
            positions: Where the tokens stand, from `place`.
            cache: Must hold those layers' keys and values of every earlier position.
            start: First layer, from 0.
            stop: One past the last layer, at most L.

        Returns:
            [B, Q, D], the output of layer `stop - 1`.
        """
        if start >= stop:
            return hidden
        self.calls.add(start, stop, *hidden.shape[:2])
        return self._network.run_layers(hidden, positions, cache, start, stop)

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

    def adapt(
        self, hidden: Tensor, positions: Positions, cache: KVCache, exit_layer: int, source: ValueSource
    ) -> Tensor:
        """What `unembed` reads at an exit: its adapter's output, or the state itself where there is none.

        The adapter's keys and values of these positions are written.

        Args:
            hidden: [B, Q, D], the output of layer `exit_layer - 1`.
            positions: Where the tokens stand, from `place`.
            cache: As for `run_layers`.
            exit_layer: E.
            source: Which token's values the adapter reads.
        """
        adapter = self._adapters.get(exit_layer)
        return hidden if adapter is None else adapter.read(hidden, positions, cache, source)

    def read(
        self,
        hidden: Tensor,
        positions: Positions,
        cache: KVCache,
        source: ValueSource = ValueSource.COMMITTED,
    ) -> Tensor:
        """What this decoder's own head reads: the state, or in a decoder that drafts through an adapter its output."""
        if self._adapter is None:
            return hidden
        self.calls.add(self._adapter, self._adapter + 1, *hidden.shape[:2])
        return self._network.run_adapter(self._adapter, hidden, positions, cache, source)

    def write_adapter_keys(self, hidden: Tensor, positions: Positions, cache: KVCache) -> None:
        """Write the keys and values of this decoder's own adapter, which counts as a call of a layer."""
        if self._adapter is not None:
            self.calls.add(self._adapter, self._adapter + 1, *hidden.shape[:2])
            self._network.write_keys(self._adapter, hidden, positions, cache)

    def unembed(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Final norm and head: [B, Q, D] -> logits [B, Q, V] in float32.

        Bare exits share those of the last layer; an adapter has a norm of its own, and may have a smaller head.

        Args:
            hidden: The output of the last layer, or what `adapt` made of the state at an exit.
            exit_layer: E; the last layer if not given.
        """
        if exit_layer in self._adapters:
            return self._adapters[exit_layer].unembed(hidden)
        logits = self._network.unembed(hidden)
        cap = self.config.final_logit_softcapping
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        if self._token_ids is None:
            return logits
        everything = logits.new_full((*logits.shape[:-1], self._own.vocab_size), -torch.inf)
        return everything.index_copy_(-1, self._token_ids, logits)

    def own_logits(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """As `unembed`, of the tokens that this process has: [B, Q, W], those of `vocabulary`."""
        return self.unembed(hidden, exit_layer)

    def whole_logits(self, own: Tensor) -> Tensor:
        """What `own_logits` gave, with the logits of all processes: [B, Q, W] -> [B, Q, V]."""
        return own

    def checked_logits(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """As `unembed`; waits for the device.

        Raises:
            NotFiniteError: A logit is infinite or not a number, but for tokens that an adapter's head doesn't have.
        """
        logits = self.unembed(hidden, exit_layer)
        ids = self._adapters[exit_layer]._token_ids if exit_layer in self._adapters else self._token_ids
        check_finite(logits if ids is None else logits[..., ids], self.dtype)
        return logits

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

    def pick(
        self,
        hidden: Tensor,
        draw: Draw | None,
        first: Sequence[int],
        *,
        exit_layer: int | None = None,
        confident: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Choose tokens from states that norm and head can read.

        Args:
            hidden: [B, Q, D], as for `unembed`.
            draw: How to choose; the most likely token if not given.
            first: Position of each row's first token to choose; the others follow.
            exit_layer: As for `unembed`.
            confident: Also return the chosen tokens' probabilities.

        Returns:
            [B, Q] token ids, `NO_TOKEN` where no logit is a finite number; and [B, Q] probabilities, or None.
        """
        vocabulary = self.vocabulary
        scores = vocabulary.filter(draw, self.unembed(hidden, exit_layer))
        tokens = choose_among(scores, draw, first)
        return tokens, vocabulary.at(vocabulary.softmax(scores), tokens) if confident else None
