"""The network: three verbs and the one layer loop of the package.

    hidden = decoder.embed(tokens)
    hidden = decoder.run_layers(hidden, positions, cache, start, stop)
    logits = decoder.unembed(hidden)

Shapes: B rows, Q query tokens a row, D width, H query heads, H_kv key/value heads, D_head channels of a head,
V vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.attention import Positions, attend, place
from layerskip.model.cache import KVCache
from layerskip.model.config import ModelConfig
from layerskip.model.linear import Linear
from layerskip.model.rope import RopeTable, rotate


@dataclass(kw_only=True)
class LayerWeights:
    """Weights of one layer; a norm is None where the family has none."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o: Linear
    post_attention_norm: Tensor | None = None
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    post_mlp_norm: Tensor | None = None


class Decoder:
    """A decoder-only transformer of any supported family."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        head: Linear,
        dtype: torch.dtype,
        device: torch.device,
        max_context: int,
    ) -> None:
        """Put a network together from loaded weights (`weights.load_decoder` does that for a checkpoint).

        Args:
            config: Sizes and switches.
            embedding: [V, D], in any floating dtype.
            layers: L layers.
            final_norm: [D].
            head: D -> V.
            dtype: Dtype of hidden states and cache.
            device: Where everything lives.
            max_context: Longest sequence in tokens that may be run.
        """
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_context = max_context
        self.layer_calls = 0
        """Layers entered so far, each counted once a call whatever its rows and tokens."""
        self._embedding = embedding
        self._layers = list(layers)
        self._final_norm = final_norm
        self._head = head
        self._ropes = {
            kind: RopeTable(rope, max_context, dtype, device)
            for kind, rope in config.ropes.items()
            if kind in config.layer_types
        }
        self._multiplier = torch.tensor(config.embedding_multiplier, dtype=dtype).item()
        self._on_cpu = device.type == "cpu"
        self._epsilon = torch.tensor(config.rms_norm_eps, device=device)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """A cache of `num_rows` rows of `capacity` tokens for this network."""
        return KVCache(self.config, num_rows=num_rows, capacity=capacity, dtype=self.dtype, device=self.device)

    def place(self, cache: KVCache, first: Sequence[int], num_queries: int) -> Positions:
        """Positions for Q consecutive tokens in each row, row b starting at `first[b]`."""
        return place(self.config, self._ropes, cache, first, num_queries, self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, Q] token ids -> [B, Q, D]."""
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
        for index in range(start, stop):
            hidden = self._run_layer(index, hidden, positions, cache)
        self.layer_calls += max(0, stop - start)
        return hidden

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [B, Q, D] -> logits [B, Q, V] in float32. Exits at every layer share them."""
        logits = self._head(self._norm(hidden, self._final_norm)).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _run_layer(self, index: int, hidden: Tensor, positions: Positions, cache: KVCache) -> Tensor:
        weights = self._layers[index]
        out = self._attention(index, self._norm(hidden, weights.attention_norm), positions, cache)
        if weights.post_attention_norm is not None:
            out = self._norm(out, weights.post_attention_norm)
        hidden = hidden + out
        out = self._mlp(weights, self._norm(hidden, weights.mlp_norm))
        if weights.post_mlp_norm is not None:
            out = self._norm(out, weights.post_mlp_norm)
        return hidden + out

    def _attention(self, index: int, x: Tensor, positions: Positions, cache: KVCache) -> Tensor:
        config, weights = self.config, self._layers[index]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        span = positions.spans[config.layer_types[index]]
        qkv = weights.qkv(x).view(*x.shape[:2], heads + 2 * kv_heads, config.head_dim)
        query_key, value = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            query = self._norm(query_key[:, :, :heads], weights.q_norm)
            query_key = torch.cat((query, self._norm(query_key[:, :, heads:], weights.k_norm)), 2)
        query_key = rotate(query_key, span.cos, span.sin)
        cache.keys[index][positions.slots] = query_key[:, :, heads:]
        cache.values[index][positions.slots] = value
        out = attend(query_key[:, :, :heads], cache, index, span, config.attention_scale)
        return weights.o(out)

    def _mlp(self, weights: LayerWeights, x: Tensor) -> Tensor:
        gate, up = weights.gate_up(x).chunk(2, -1)
        match self.config.hidden_act:
            case "silu":
                gate = F.silu(gate)
            case "gelu_pytorch_tanh":
                gate = F.gelu(gate, approximate="tanh")
            case _:
                gate = F.gelu(gate)
        return weights.down(gate.mul_(up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension, computed in float32. Source: arXiv:1910.07467."""
        if x.dtype != weight.dtype:
            return self._norm(x.float(), weight).to(x.dtype)
        if not self._on_cpu:
            return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
        # torch's own is ten small operators on a CPU; these five take a fifth less time.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return scale.mul(x).mul_(weight)
