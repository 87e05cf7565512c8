"""The network: three verbs.

    hidden = decoder.embed(tokens)
    hidden = decoder.run_layers(hidden, positions, cache, start, stop)
    logits = decoder.unembed(hidden)

Shapes: B rows, Q query tokens a row, D width, V vocabulary, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.cache import KVCache
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.drafts import DraftRequest, Drafts, Draw, GreedyRound
from layerskip.model.graphs.compiled import CompiledRound, CompiledRounds, RoundMode
from layerskip.model.graphs.static import RoundParts
from layerskip.model.positions import Positions
from layerskip.model.rope import RopeTable
from layerskip.model.torch.linear import Linear
from layerskip.model.torch.network import LayerWeights, TorchNetwork


class Network(Protocol):
    """Layers and head with their weights: `torch_network.TorchNetwork`, or `native_network.NativeNetwork`."""

    @property
    def kernels(self) -> str:
        """`native` or `torch`."""
        ...

    @property
    def layers(self) -> Sequence[LayerWeights[Linear]]:
        """Weights of each layer."""
        ...

    @property
    def head(self) -> Linear:
        """D -> V."""
        ...

    def run_layers(self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int) -> Tensor:
        """[B, Q, D], the input of layer `start` -> [B, Q, D], the output of layer `stop - 1`."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, V] in float32, before any cap."""
        ...

    def choose(
        self, inputs: Tensor, positions: Positions, cache: KVCache, start: int, stop: int, draw: Draw | None
    ) -> Tensor | None:
        """`Decoder.choose`."""
        ...

    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest) -> Drafts | None:
        """`Decoder.draft`."""
        ...


@dataclass
class _LayerCalls:
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """What writes drafts."""

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
        rounds: RoundMode = "off",
    ) -> None:
        """Put a network together from loaded weights (`weights.load_decoder` does that for a checkpoint).

        Args:
            config: Sizes and switches.
            embedding: [V, D], in any floating dtype or in blocks.
            network: Layers and head.
            ropes: Rotary table of each kind of layer.
            dtype: Dtype of hidden states and cache.
            device: Where everything lives.
            max_context: Longest sequence in tokens that may be run.
            token_ids: [N] ids of the head's outputs, where it has some only.
            rounds: How `round_greedy` runs whole rounds; other than `off` it takes a network in torch.
        """
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_context = max_context
        self._calls = _LayerCalls()
        self._token_ids = token_ids
        self._drafter: Drafter | None = None
        self._embedding = embedding
        self._network = network
        self._ropes = ropes
        self._multiplier = torch.tensor(config.embedding_multiplier, dtype=dtype).item()
        self._rounds: CompiledRounds | None = None
        if rounds != "off":
            assert isinstance(network, TorchNetwork), type(network)
            parts = RoundParts(
                config=config, network=network, embed=self.embed, unembed=self.unembed, ropes=ropes, dtype=dtype
            )
            self._rounds = CompiledRounds(parts, rounds, device=device, max_context=max_context)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    @property
    def compiles_rounds(self) -> bool:
        """Whether `round_greedy` ever does anything."""
        return self._rounds is not None

    @property
    def compiled(self) -> tuple[CompiledRound, ...]:
        """Rounds that were compiled or captured so far, with the seconds that this took."""
        return () if self._rounds is None else tuple(self._rounds.report)

    @property
    def provisional_rounds(self) -> int:
        """Calls of `round_greedy` so far that took longer than the same ones will, once they are compiled."""
        return 0 if self._rounds is None else self._rounds.provisional

    @property
    def kernels(self) -> str:
        """What computes: `native` or `torch`."""
        return self._network.kernels

    def weight_bytes(self, start: int, stop: int, *, head: bool = True) -> int:
        """Bytes of weights that a pass through layers start..stop-1, and the head, reads."""
        layers = sum(layer.num_bytes for layer in self._network.layers[start:stop])
        return layers + (self._network.head.num_bytes if head else 0)

    @property
    def layer_calls(self) -> int:
        """Layers entered so far, while drafting too, each counted once a call whatever its rows and tokens."""
        return self._calls.count

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Layers entered meanwhile aren't counted."""
        before = self._calls.count
        try:
            yield
        finally:
            self._calls.count = before

    def set_drafter(self, decoder: "Decoder", *, num_layers: int, shares_states: bool) -> None:
        """Let another decoder write drafts, at exits up to `num_layers`; it uses this one's caches."""
        decoder._calls = self._calls
        self._drafter = Drafter(decoder=decoder, num_layers=num_layers, shares_states=shares_states)

    def drafter(self, exit_layer: int) -> "Drafter":
        """What writes drafts at an exit."""
        if self._drafter is not None and exit_layer <= self._drafter.num_layers:
            return self._drafter
        return Drafter(decoder=self, num_layers=self.num_layers, shares_states=True)

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache of `num_rows` rows of at least `capacity` tokens for this network."""
        if self._rounds is not None:
            return self._rounds.new_cache(num_rows, capacity)
        return KVCache(self.config, num_rows=num_rows, capacity=capacity, dtype=self.dtype, device=self.device)

    def place(self, cache: KVCache, first: Sequence[int], num_queries: int) -> Positions:
        """Positions for Q consecutive tokens in each row, row b starting at `first[b]`."""
        return Positions(self.config, self._ropes, cache, first, num_queries, self.dtype)

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
        self._calls.count += stop - start
        return self._network.run_layers(hidden, positions, cache, start, stop)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [B, Q, D] -> logits [B, Q, V] in float32. Exits at every layer share them."""
        logits = self._network.unembed(hidden)
        cap = self.config.final_logit_softcapping
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        if self._token_ids is None:
            return logits
        everything = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return everything.index_copy_(-1, self._token_ids, logits)

    def choose(
        self,
        inputs: Tensor,
        positions: Positions,
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None = None,
    ) -> Tensor | None:
        """The token after each of a block, in one call where the network can do that.

        Args:
            inputs: [B, Q] token ids, with `start` 0; or [B, Q, D], the input of layer `start`.
            positions: Where the tokens stand, from `place`.
            cache: As for `run_layers`.
            start: First layer, from 0.
            stop: One past the last layer.
            draw: How to choose; the likeliest token if not given.

        Returns:
            [B, Q] token ids, or None where it takes `embed`, `run_layers` and `unembed`.
        """
        chosen = self._network.choose(inputs, positions, cache, start, stop, draw)
        if chosen is not None:
            self._calls.count += stop - start
        return chosen

    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest) -> Drafts | None:
        """Write tokens with the first layers, in one call where the network can do that.

        Args:
            tokens: [B, 1], the last token of each row, right after what its row of the cache has committed.
            cache: Nothing is committed.
            request: What to write.

        Returns:
            The drafts, or None where it takes `embed`, `run_layers` and `unembed`, K times over.
        """
        found = self._network.draft(tokens, cache, request)
        if found is not None:
            self._calls.count += (found.tokens.shape[1] + request.complete) * request.exit_layer
        return found

    def round_greedy(
        self, tokens: Sequence[int], cache: KVCache, exit_layer: int, num_drafts: int, stop: int | None = None
    ) -> GreedyRound | None:
        """Draft with the first layers and verify with the others, all in one call where rounds are compiled.

        With no drafts and exit 0 it is an autoregressive step.

        Args:
            tokens: B token ids, the last of each row, right after what its row of the cache has committed.
            cache: Nothing is committed. Drafts for which a row has no room go to the scratch slot; they, and the
                targets after them, mean nothing.
            exit_layer: E, layers that draft; 0 where nothing is drafted.
            num_drafts: K.
            stop: Layers in all; L if not given.

        Returns:
            Drafts and targets, or None where it takes the other verbs.
        """
        if self._rounds is None or (exit_layer > 0 and self.drafter(exit_layer).decoder is not self):
            return None
        stop = self.num_layers if stop is None else stop
        found = self._rounds.run(tokens, cache, exit_layer=exit_layer, num_drafts=num_drafts, stop=stop)
        if found is not None:
            self._calls.count += num_drafts * exit_layer + stop
        return found
