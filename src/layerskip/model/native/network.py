"""Layers and head in compiled code, for float32 on a CPU.

In torch, a layer of a small model is some twenty operators with microseconds of fixed cost each; here, a pass over any
number of layers is one call. Weights that bfloat16 holds exactly are stored in it, which halves the bytes read for each
token and changes no result. A token's result doesn't depend, to the last bit, on the tokens computed with it: verifying
several tokens at once gives the same results as computing one after the other.

Shapes: B rows, Q query tokens a row, N tokens of rows that may have different numbers of them, one row after the other,
D width, V vocabulary, I input width, O output width.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.model.blocks import BlockWeight
from layerskip.model.cache import KVCache
from layerskip.model.config.model_config import SLIDING, ModelConfig
from layerskip.model.drafts import DraftRequest
from layerskip.model.draw import Draw
from layerskip.model.finite import not_finite
from layerskip.model.native.arrays import int32s, int64s, split
from layerskip.model.native.library import (
    ACTIVATIONS,
    COMPUTE,
    FORMATS,
    PANEL,
    AdaptCall,
    CacheView,
    ChooseCall,
    DraftCall,
    EmbeddingView,
    ExpertView,
    LayerView,
    NetworkView,
    RunLayersCall,
    StopRuleView,
    address,
    load_library,
    settle_library,
)
from layerskip.model.native.linear import NativeLinear
from layerskip.model.native.sampling import sampling_view
from layerskip.model.native.sums import Sums
from layerskip.model.native.threads import kernel_threads
from layerskip.model.parallel.share import Membership
from layerskip.model.positions import Positions, ValueSource
from layerskip.model.rope import RopeTable
from layerskip.model.torch.network import LayerWeights

LANES = 8
"""Number of channels that kernels take at once."""
CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`Format` of native/kernels/linear.h for the dtypes in which kernels read keys and values."""
EMBEDDING_FORMATS = ("float32", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""Formats of embedding tables that kernels can read."""


def why_not_native(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `NativeNetwork` can't run this model on this device, or None if it can."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"they compute in float32 on a CPU, not in {dtype} on {device}"
    if load_library() is None:
        return (
            "they weren't built when the package was installed (this needs a C++ compiler), or not for this processor; "
            "layerskip info tells more"
        )
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    if config.hidden_size % PANEL or config.head_dim % LANES or heads * config.head_dim % PANEL:
        return f"its width {config.hidden_size} or its heads of {config.head_dim} channels aren't multiples of {PANEL}"
    return None


class NativeNetwork:
    """Layers and head in compiled code (`network.Network`)."""

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
        adapter: int | None = None,
        member: Membership | None = None,
    ) -> None:
        """Put loaded weights together.

        Args:
            config: Sizes and switches; `why_not_native` finds nothing against them.
            layers: L layers of `NativeLinear`, gate and up interleaved, then those of the exit adapters.
            final_norm: [D].
            head: D -> V.
            embedding: [V, D].
            ropes: Rotary table of each kind of layer.
            tokens: [N] ids of the head's outputs, if they are a part of the vocabulary; `unembed` then gives N logits.
            adapter: The layer that adapts what norm and head read in `choose` and `draft`.
            member: The processes that share the network, if several do; `choose` and `draft` then can't be called.
        """
        library = settle_library()
        self.config = config
        self.layers = list(layers)
        self.final_norm = final_norm
        self.head = head
        self._tokens = tokens
        self._ropes = ropes
        self._run_layers, self._unembed = library.layerskip_run_layers, library.layerskip_unembed
        self._choose, self._draft = library.layerskip_choose, library.layerskip_draft
        self._write_keys, self._run_adapter = library.layerskip_write_keys, library.layerskip_run_adapter
        self._exits = (ctypes.c_int32 * len(config.adapted_exits))(*config.adapted_exits)
        self._embedding = _embedding_view(embedding, config)
        self._latest_cache: tuple[Callable[[], KVCache | None], CacheView] = (lambda: None), CacheView()
        self._kept: list[ctypes.Array[Any]] = []  # what views point to
        self._views = (LayerView * len(self.layers))(*(self._view(*pair) for pair in enumerate(self.layers)))
        self._network = NetworkView(
            layers=ctypes.addressof(self._views),
            final_norm=final_norm.data_ptr(),
            head=head.view,
            token_ids=None if tokens is None else tokens.data_ptr(),
            exits=address(self._exits),
            num_layers=config.num_layers,
            num_adapters=len(config.adapted_exits),
            adapter=-1 if adapter is None else adapter,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=next(iter(ropes.values())).rotary_dim,
            intermediate_size=self._inner_size(experts=False),
            num_experts=config.num_experts if config.sparse_layers else 0,
            experts_per_token=config.num_experts_per_tok,
            expert_size=self._inner_size(experts=True),
            norm_expert_weights=config.norm_topk_prob,
            vocab_size=head.outputs,
            activation=ACTIVATIONS[config.hidden_act],
            rms_norm_eps=config.rms_norm_eps,
            attention_scale=config.attention_scale,
            residual_multiplier=config.residual_multiplier,
            joint_qk_norm=config.joint_qk_norm,
        )
        self._sums = None if member is None else Sums(member)
        if self._sums is not None:
            self._sums.join(self._network)

    @property
    def compute(self) -> str:
        """What inputs of products of the layers or the head are rounded to (a key of `COMPUTE`), if any are."""
        own = self.layers[: self._network.num_layers]
        products = [self.head, *(part for layer in own for part in (layer.qkv, *(down for _, down in layer.gated)))]
        rounded = next((product.view.compute for product in products if product.view.compute), COMPUTE["float32"])
        return next(name for name, value in COMPUTE.items() if value == rounded)

    def run_layers(self, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int) -> Tensor:
        """[B, Q, D], the input of layer `start` -> [B, Q, D], the output of layer `stop - 1`."""
        out = hidden.clone(memory_format=torch.contiguous_format)
        self._call_layers(self._run_layers, out, positions, cache, start, stop)
        return out

    def run_adapter(
        self, layer: int, hidden: Tensor, positions: Positions, cache: KVCache, source: ValueSource
    ) -> Tensor:
        """[B, Q, D], the output of the exit -> [B, Q, D], what norm and head read."""
        out = hidden.clone(memory_format=torch.contiguous_format)
        slots = [slot for row in positions.source_slots(cache.lengths, source) for slot in row]
        view, starts, sources = self.cache_view(cache), int64s(positions.first), int64s(slots)
        counts = int32s([positions.num_queries] * len(positions.first))
        self._network.threads = kernel_threads()
        self._run_adapter(
            AdaptCall(
                network=address(self._network),
                cache=address(view),
                starts=address(starts),
                counts=address(counts),
                sources=address(sources),
                hidden=out.data_ptr(),
                rows=len(positions.first),
                layer=layer,
            )
        )
        self._check_sums()
        return out

    def write_keys(self, layer: int, hidden: Tensor, positions: Positions, cache: KVCache) -> None:
        """Write a layer's keys and values for its input [B, Q, D]."""
        self._call_layers(self._write_keys, hidden.contiguous(), positions, cache, layer, layer + 1)

    def run_rows(
        self, hidden: Tensor, starts: Sequence[int], counts: Sequence[int], cache: KVCache, start: int, stop: int
    ) -> Tensor:
        """`run_layers` of rows with different numbers of tokens.

        Args:
            hidden: [N, D], the input of layer `start`; is overwritten and returned.
            starts: Position of each row's first token.
            counts: Tokens of each row.
            cache: As for `run_layers`.
            start: First layer, from 0.
            stop: One past the last layer.
        """
        assert hidden.is_contiguous() and len(hidden) == sum(counts), (hidden.shape, counts)
        self._call_rows(self._run_layers, hidden, starts, counts, cache, start, stop)
        return hidden

    def _call_layers(
        self, function: Any, hidden: Tensor, positions: Positions, cache: KVCache, start: int, stop: int
    ) -> None:
        counts = [positions.num_queries] * len(positions.first)
        self._call_rows(function, hidden, positions.first, counts, cache, start, stop)

    def _call_rows(
        self,
        function: Any,
        hidden: Tensor,
        first: Sequence[int],
        numbers: Sequence[int],
        cache: KVCache,
        start: int,
        stop: int,
    ) -> None:
        view, starts, counts = self.cache_view(cache), int64s(first), int32s(numbers)
        self._network.threads = kernel_threads()
        function(
            RunLayersCall(
                network=address(self._network),
                cache=address(view),
                starts=address(starts),
                counts=address(counts),
                hidden=hidden.data_ptr(),
                rows=len(first),
                start=start,
                stop=stop,
            )
        )
        self._check_sums()

    def _check_sums(self) -> None:
        if self._sums is not None:
            self._sums.check()

    def unembed(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, V] in float32, before any cap."""
        rows, queries, _ = hidden.shape
        hidden = hidden.contiguous()
        logits = torch.empty(rows, queries, self._network.head.outputs)
        self._network.threads = kernel_threads()
        self._unembed(self._network, hidden.data_ptr(), rows * queries, logits.data_ptr())
        return logits[..., : self.head.outputs]

    @property
    def view(self) -> NetworkView:
        """The structure for calls, with the number of threads that are to work."""
        self._network.threads = kernel_threads()
        return self._network

    @property
    def embedding_view(self) -> EmbeddingView | None:
        """The structure for the embedding table, if `embeds`."""
        return self._embedding

    @property
    def embeds(self) -> bool:
        """Whether kernels can read the embedding table."""
        return self._embedding is not None

    def choose(
        self,
        inputs: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None,
    ) -> Tensor:
        """`Decoder.choose` in one call, of rows with different numbers of tokens; not where logits are capped.

        Args:
            inputs: Token ids [N], only if `embeds`; or [N, D], the input of layer `start`, which is overwritten.
            starts: Position of each row's first token.
            counts: Tokens of each row.
            cache: As for `run_layers`.
            start: First layer, from 0.
            stop: One past the last layer.
            draw: How to choose; the most likely token if not given.

        Returns:
            [N] token ids; `NO_TOKEN` where no logit is a finite number.
        """
        tokens, hidden = None, inputs
        if inputs.dtype == torch.long:
            tokens, hidden = inputs, torch.empty(len(inputs), self.config.hidden_size)
        assert inputs.is_contiguous() and len(inputs) == sum(counts), (inputs.shape, counts)
        chosen = torch.empty(len(inputs), dtype=torch.long)
        view, places, numbers = self.cache_view(cache), int64s(starts), int32s(counts)
        sampling = None if draw is None else sampling_view(draw)
        self._network.threads = kernel_threads()
        self._choose(
            ChooseCall(
                network=address(self._network),
                cache=address(view),
                embedding=address(self._embedding),
                sampling=address(sampling),
                tokens=None if tokens is None else tokens.data_ptr(),
                starts=address(places),
                counts=address(numbers),
                hidden=hidden.data_ptr(),
                chosen=chosen.data_ptr(),
                rows=len(counts),
                start=start,
                stop=stop,
            )
        )
        return chosen

    def draft(
        self, tokens: Sequence[int], cache: KVCache, request: DraftRequest, *, complete: bool
    ) -> tuple[list[list[int]], Tensor, Sequence[Sequence[float]]]:
        """`Decoder.draft` in one call; only if `embeds`.

        Args:
            tokens: B token ids, the last of each row.
            cache: Holds the committed tokens of the rows.
            request: What to draft.
            complete: Run each row's last draft through the layers as well.

        Returns:
            Each row's drafts; if `complete`, [N, D], the outputs of the exit for each row's last token and its drafts;
            and with a `StopRule` the probabilities of each row's drafts, also of a last one that was given up.
        """
        rows, stop = len(tokens), request.stop
        limits = request.limits(rows)
        total = sum(limits)
        view, last, starts = self.cache_view(cache), int64s(tokens), int64s(cache.lengths)
        most, written, drawn = int32s(limits), (ctypes.c_int32 * rows)(), (ctypes.c_int32 * rows)()
        hidden = torch.empty(total + rows if complete else 0, self.config.hidden_size)
        drafts, confidences = (ctypes.c_int64 * total)(), (ctypes.c_float * total)()
        stop_rule = None if stop is None else StopRuleView(rates=stop.rates, least=stop.least, kept=stop.kept)
        sampling = None if request.draw is None else sampling_view(request.draw)
        self._network.threads = kernel_threads()
        problem = self._draft(
            DraftCall(
                network=address(self._network),
                cache=address(view),
                embedding=address(self._embedding),
                stop_rule=address(stop_rule),
                sampling=address(sampling),
                tokens=address(last),
                starts=address(starts),
                limits=address(most),
                written=address(written),
                drawn=address(drawn),
                hidden=hidden.data_ptr(),
                drafts=address(drafts),
                confidences=address(confidences),
                rows=rows,
                exit_layer=request.exit_layer,
                complete=complete,
            )
        )
        if problem:
            raise not_finite(torch.float32)
        return (
            split(list(drafts), written),
            hidden[: sum(written) + rows] if complete else hidden,
            () if stop is None else split(list(confidences), drawn),
        )

    def cache_view(self, cache: KVCache) -> CacheView:
        """The structure for a cache; the latest one is kept, since most calls come with the same cache."""
        known, view = self._latest_cache  # read and written as one, because threads may share a network
        if known() is cache:
            return view
        scales = dict(
            zip(("key_scales", "value_scales"), (part.data_ptr() for part in cache.buffers[2:]), strict=False)
        )
        view = CacheView(
            **scales,
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            layer_stride=cache.keys.stride(0),
            row_stride=cache.keys.stride(1),
            capacity=cache.capacity,
            format=CACHE_FORMATS[cache.keys.dtype],
        )
        self._latest_cache = weakref.ref(cache), view
        return view

    def _inner_size(self, *, experts: bool) -> int:
        """Width of MLPs or of experts, up to whole panels; 0 if there are none."""
        layers = (layer for layer in self.layers if (layer.experts is not None) == experts)
        return next((layer.gated[0][0].view.outputs // 2 for layer in layers), 0)

    def _view(self, index: int, layer: LayerWeights[NativeLinear]) -> LayerView:
        kind = self.config.attention_of(index)
        rope, window = self._ropes[kind], self.config.sliding_window if kind == SLIDING else None
        norms = {
            name: None if getattr(layer, name) is None else getattr(layer, name).data_ptr()
            for name in ("attention_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
        }
        names = ("input", "qkv", "o", "gate_up", "down")
        linears = {name: linear.view for name in names if (linear := getattr(layer, name)) is not None}
        view = LayerView(**linears, **norms, window=window or 0)
        if layer.experts is not None:
            experts = (ExpertView * self.config.num_experts)(
                *(ExpertView(gate_up=gate_up.view, down=down.view) for gate_up, down in layer.gated)
            )
            self._kept.append(experts)
            view.router, view.experts = layer.experts.router.view, address(experts)
        if self.config.rotates(index):
            view.cosines, view.sines = rope.cos.data_ptr(), rope.sin.data_ptr()
        if layer.fusion is not None:
            layers = (ctypes.c_int32 * len(layer.fusion.layers))(*layer.fusion.layers)
            self._kept.append(layers)
            view.values, view.value_layers = layer.fusion.values.view, address(layers)
            view.distances, view.num_value_layers = layer.fusion.distances.data_ptr(), len(layers)
        return view


def _embedding_view(table: Tensor | BlockWeight, config: ModelConfig) -> EmbeddingView | None:
    """The structure for an embedding table, or None if kernels can't read its format."""
    data = table.data if isinstance(table, BlockWeight) else table
    name = table.format if isinstance(table, BlockWeight) else str(table.dtype).removeprefix("torch.")
    if name not in EMBEDDING_FORMATS or not data.is_contiguous():
        return None
    multiplier = torch.tensor(config.embedding_multiplier, dtype=torch.float32).item()
    return EmbeddingView(table=data.data_ptr(), format=FORMATS[name], multiplier=multiplier)
