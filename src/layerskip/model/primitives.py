"""What a network can do: embed tokens, run layers, read logits; and what is known of it.

Shapes: B rows, Q query tokens a row, D width, V vocabulary, L layers, E exit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.cache import KVCache, cache_bytes, token_bytes
from layerskip.model.choosing.sampling import Vocabulary, WholeVocabulary, choose_among
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.draw import Draw
from layerskip.model.finite import check_finite
from layerskip.model.network import Network
from layerskip.model.positions import Positions, ValueSource
from layerskip.model.rope import RopeTable
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


class Primitives:
    """A decoder-only transformer of any supported family; `decoder.Decoder` is the same with compositions."""

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
        self._adapters: dict[int, Primitives] = {}
        """By exit that has an adapter: this network's layers with it, its norm and its head."""
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
    def kernels(self) -> str:
        """What computes: `native` or `torch`."""
        return self._network.kernels

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
