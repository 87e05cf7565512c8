"""The layers and the head as two calls into compiled code, for float32 on a CPU.

A layer of a small model is some twenty operators in torch, each with microseconds of fixed cost: here a pass over any
number of layers is one call. A row's result doesn't depend on the rows beside it, to the last bit: verification of
several tokens gives what one after the other gives.

Shapes: B rows, Q query tokens a row, D width, V vocabulary.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.cache import KVCache
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.drafts import DraftRequest, Drafts
from layerskip.model.draw import Draw
from layerskip.model.finite import not_finite
from layerskip.model.native.library import (
    ACTIVATIONS,
    FORMATS,
    PANEL,
    CacheView,
    DraftStopView,
    EmbeddingView,
    LayerView,
    NetworkView,
    load_library,
)
from layerskip.model.native.linear import NativeLinear
from layerskip.model.native.sampling import sampling_view
from layerskip.model.positions import Positions
from layerskip.model.rope import RopeTable
from layerskip.model.torch.network import LayerWeights

LANES = 8
"""Channels that kernels take at once."""
EMBEDDING_FORMATS = ("float32", "bfloat16", "q8_0", "q4_0", "q4_1")
"""Formats of embedding tables that kernels read."""


def why_not_native(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `NativeNetwork` can't run a model of these sizes here, or None where it can."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"they compute in float32 on a CPU, not in {dtype} on {device}"
    if load_library() is None:
        return "they weren't built when the package was installed (this needs a C++ compiler), or for another processor"
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    if config.hidden_size % PANEL or config.head_dim % LANES or heads * config.head_dim % PANEL:
        return f"its width {config.hidden_size} or its heads of {config.head_dim} channels aren't multiples of {PANEL}"
    return None


class NativeNetwork:
    """Layers and head in compiled code (`decoder.Network`)."""

    kernels = "native"

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: Sequence[LayerWeights[NativeLinear]],
        final_norm: Tensor,
        head: NativeLinear,
        embedding: Tensor | BlockWeight,
        ropes: Mapping[str, RopeTable],
        tokens: Tensor | None = None,
    ) -> None:
        """Put loaded weights together.

        Args:
            config: Sizes and switches; `why_not_native` finds nothing against them.
            layers: L layers, gate and up interleaved.
            final_norm: [D].
            head: D -> V.
            embedding: [V, D].
            ropes: Rotary table of each kind of layer.
            tokens: [N] ids of the head's outputs, where it has some only; `unembed` still gives N logits.
        """
        library = load_library()
        assert library is not None
        self.config = config
        self.layers = list(layers)
        self.final_norm = final_norm
        self.head = head
        self._tokens = tokens
        self._ropes = ropes
        self._run_layers, self._unembed = library.layerskip_run_layers, library.layerskip_unembed
        self._choose, self._draft = library.layerskip_choose, library.layerskip_draft
        self._embedding = _embedding_view(embedding, config)
        self._cache: Callable[[], KVCache | None] = lambda: None
        self._views = (LayerView * len(self.layers))(*(self._view(*pair) for pair in enumerate(self.layers)))
        self._network = NetworkView(
            layers=ctypes.addressof(self._views),
            final_norm=final_norm.data_ptr(),
            head=head.view,
            tokens=None if tokens is None else tokens.data_ptr(),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_channels=config.head_dim,
            rotary_channels=next(iter(ropes.values())).rotary_dim,
            mlp_width=self.layers[0].gate_up.view.outputs // 2,
            vocabulary=head.outputs,
            activation=ACTIVATIONS[config.hidden_act],
            epsilon=config.rms_norm_eps,
            attention_scale=config.attention_scale,
        )

    def run_layers(self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int) -> Tensor:
        """[B, Q, D], the input of layer `start` -> [B, Q, D], the output of layer `stop - 1`."""
        out = hidden.clone(memory_format=torch.contiguous_format)
        self._network.threads = torch.get_num_threads()
        rows, queries = len(positions.first), positions.num_queries
        first = (ctypes.c_int64 * rows)(*positions.first)
        self._run_layers(self._network, out.data_ptr(), rows, queries, first, self._cache_view(cache), start, stop)
        return out

    def unembed(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, V] in float32, before any cap."""
        rows, queries, _ = hidden.shape
        hidden = hidden.contiguous()
        logits = torch.empty(rows, queries, self._network.head.outputs)
        self._network.threads = torch.get_num_threads()
        self._unembed(self._network, hidden.data_ptr(), rows * queries, logits.data_ptr())
        return logits[..., : self.head.outputs]

    @property
    def embeds(self) -> bool:
        """Whether kernels can read the embedding table."""
        return self._embedding is not None

    def choose(
        self, inputs: Tensor, positions: Positions, cache: KVCache, start: int, stop: int, draw: Draw | None
    ) -> Tensor:
        """`Decoder.choose` in one call; of token ids only if `embeds`, and not where logits are capped."""
        rows, queries = len(positions.first), positions.num_queries
        tokens = None
        if inputs.dtype == torch.long:
            tokens, hidden = inputs.contiguous(), torch.empty(rows, queries, self.config.hidden_size)
        else:
            hidden = inputs.clone(memory_format=torch.contiguous_format)
        chosen = torch.empty(rows, queries, dtype=torch.long)
        self._network.threads = torch.get_num_threads()
        self._choose(
            self._network,
            self._embedding,
            None if tokens is None else tokens.data_ptr(),
            hidden.data_ptr(),
            rows,
            queries,
            (ctypes.c_int64 * rows)(*positions.first),
            self._cache_view(cache),
            start,
            stop,
            None if draw is None else sampling_view(draw),
            chosen.data_ptr(),
        )
        return chosen

    def draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest, *, complete: bool) -> Drafts:
        """`Decoder.draft` in one call; only if `embeds`.

        Args:
            tokens: [B, 1].
            cache: Holds the committed tokens of the rows.
            request: What to draft.
            complete: Run the last draft through the layers as well.
        """
        rows, stop, draw = cache.num_rows, request.stop, request.draw
        tokens = tokens.contiguous()  # a copy must live until the call returns
        hidden = torch.empty(request.num_drafts + 1, rows, self.config.hidden_size)
        drafts = torch.empty(request.num_drafts, rows, dtype=torch.long)
        confidences = (ctypes.c_float * (request.num_drafts * rows))()
        self._network.threads = torch.get_num_threads()
        made = self._draft(
            self._network,
            self._embedding,
            tokens.data_ptr(),
            rows,
            (ctypes.c_int64 * rows)(*cache.lengths),
            request.num_drafts,
            request.exit_layer,
            self._cache_view(cache),
            None if stop is None else DraftStopView(rates=stop.rates, least=stop.least),
            None if draw is None else sampling_view(draw),
            complete,
            hidden.data_ptr(),
            drafts.data_ptr(),
            confidences,
        )
        if made < 0:
            raise not_finite(torch.float32)
        return Drafts(
            tokens=drafts[:made].t(),
            exit_layer=request.exit_layer,
            hidden=hidden[: made + 1].transpose(0, 1),
            confidences=() if stop is None else [confidences[row : made * rows : rows] for row in range(rows)],
        )

    def _cache_view(self, cache: KVCache) -> CacheView:
        """The structure for a cache, kept until another one is used."""
        if self._cache() is not cache:
            self._cache = weakref.ref(cache)
            self._last_view = CacheView(
                keys=cache.keys.data_ptr(),
                values=cache.values.data_ptr(),
                layer_stride=cache.keys.stride(0),
                row_stride=cache.keys.stride(1),
                capacity=cache.capacity,
            )
        return self._last_view

    def _view(self, index: int, layer: LayerWeights[NativeLinear]) -> LayerView:
        rope = self._ropes[self.config.layer_types[index]]
        window = self.config.sliding_window if self.config.layer_types[index] == SLIDING else None
        norms = {
            name: None if getattr(layer, name) is None else getattr(layer, name).data_ptr()
            for name in ("attention_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
        }
        linears = {name: getattr(layer, name).view for name in ("qkv", "o", "gate_up", "down")}
        return LayerView(**linears, **norms, cosines=rope.cos.data_ptr(), sines=rope.sin.data_ptr(), window=window or 0)


def _embedding_view(table: Tensor | BlockWeight, config: ModelConfig) -> EmbeddingView | None:
    """The structure for an embedding table, or None where kernels can't read it."""
    data = table.data if isinstance(table, BlockWeight) else table
    name = table.format if isinstance(table, BlockWeight) else str(table.dtype).removeprefix("torch.")
    if name not in EMBEDDING_FORMATS or not data.is_contiguous():
        return None
    multiplier = torch.tensor(config.embedding_multiplier, dtype=torch.float32).item()
    return EmbeddingView(table=data.data_ptr(), format=FORMATS[name], multiplier=multiplier)
