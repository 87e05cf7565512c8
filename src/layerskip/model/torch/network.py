"""The layers and the head in torch: every family, dtype and device.

Shapes: B rows, Q query tokens a row, D width, H query heads, H_kv key/value heads, D_head channels of a head,
V vocabulary, L layers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerskip.model.cache import KVCache
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.positions import Placement, ValueSource
from layerskip.model.rope import rotate
from layerskip.model.torch.attention import attend
from layerskip.model.torch.fusion import Fusion, fuse
from layerskip.model.torch.linear import Linear, Linear_co

ATTENTION_ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which torch prefers on Hopper: it builds a plan for every new shape, which takes tens of
milliseconds, and while decoding the keys are one more at each step."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights(Generic[Linear_co]):
    """Weights of one layer, its matrices of one kind; a norm is None where the family has none."""

    input: Linear_co | None = None
    """D -> D, before all else; of exit adapters only."""
    fusion: Fusion[Linear_co] | None = None
    """What is added after attention; of exit adapters only."""

    attention_norm: Tensor
    qkv: Linear_co
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o: Linear_co
    post_attention_norm: Tensor | None = None
    mlp_norm: Tensor
    gate_up: Linear_co
    down: Linear_co
    post_mlp_norm: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the products."""
        values = None if self.fusion is None else self.fusion.values
        own = (self.input, values, self.qkv, self.o, self.gate_up, self.down)
        return sum(linear.num_bytes for linear in own if linear is not None)


class TorchNetwork:
    """Layers and head, operator by operator (`network.Network`)."""

    kernels = "torch"

    def __init__(
        self, config: ModelConfig, *, layers: Sequence[LayerWeights[Linear]], final_norm: Tensor, head: Linear
    ) -> None:
        """Put loaded weights together.

        Args:
            config: Sizes and switches.
            layers: L layers, then those of the exit adapters.
            final_norm: [D].
            head: D -> V.
        """
        self.config = config
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self._on_cpu = final_norm.device.type == "cpu"
        self._epsilon = torch.tensor(config.rms_norm_eps, device=final_norm.device)

    def run_layers(self, hidden: Tensor, positions: Placement, cache: KVCache, start: int, stop: int) -> Tensor:
        """[B, Q, D], the input of layer `start` -> [B, Q, D], the output of layer `stop - 1`."""
        with self._attention_kernels():
            for index in range(start, stop):
                hidden = self._run_layer(index, hidden, positions, cache)
                adapter = self.config.adapter_at(index + 1)
                if adapter is not None and index + 1 < stop:
                    self.write_keys(adapter, hidden, positions, cache)
        return hidden

    def run_adapter(
        self, layer: int, hidden: Tensor, positions: Placement, cache: KVCache, source: ValueSource
    ) -> Tensor:
        """[B, Q, D], the output of the exit -> [B, Q, D], what norm and head read."""
        fusion = self.layers[layer].fusion
        with self._attention_kernels():
            if fusion is None:
                return self._run_layer(layer, hidden, positions, cache)
            fused = fuse(fusion, *positions.sources(cache, source), cache)
            return self._run_layer(layer, hidden, positions, cache, fused)

    def write_keys(self, layer: int, hidden: Tensor, positions: Placement, cache: KVCache) -> None:
        """Write a layer's keys and values for its input [B, Q, D]."""
        weights = self.layers[layer]
        hidden = hidden if weights.input is None else weights.input(hidden)
        self._project(layer, self._norm(hidden, weights.attention_norm), positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, V] in float32, before any cap."""
        return self.head(self._norm(hidden, self.final_norm)).float()

    def _attention_kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self._on_cpu else sdpa_kernel(ATTENTION_ON_CUDA)

    def _run_layer(
        self, index: int, hidden: Tensor, positions: Placement, cache: KVCache, fused: Tensor | None = None
    ) -> Tensor:
        weights = self.layers[index]
        hidden = hidden if weights.input is None else weights.input(hidden)
        out = self._attention(index, self._norm(hidden, weights.attention_norm), positions, cache)
        if weights.post_attention_norm is not None:
            out = self._norm(out, weights.post_attention_norm)
        hidden = hidden + out
        if fused is not None:
            hidden = hidden + fused
        out = self._mlp(weights, self._norm(hidden, weights.mlp_norm))
        if weights.post_mlp_norm is not None:
            out = self._norm(out, weights.post_mlp_norm)
        return hidden + out

    def _attention(self, index: int, x: Tensor, positions: Placement, cache: KVCache) -> Tensor:
        span = positions.span(self.config.attention_of(index))
        out = attend(self._project(index, x, positions, cache), cache, index, span, self.config.attention_scale)
        return self.layers[index].o(out)

    def _project(self, index: int, x: Tensor, positions: Placement, cache: KVCache) -> Tensor:
        """Queries [B, Q, H, D_head]; keys and values go into the cache."""
        config, weights = self.config, self.layers[index]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        span = positions.span(config.attention_of(index))
        qkv = weights.qkv(x).view(*x.shape[:2], heads + 2 * kv_heads, config.head_dim)
        query_key, value = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            query = self._norm(query_key[:, :, :heads], weights.q_norm)
            query_key = torch.cat((query, self._norm(query_key[:, :, heads:], weights.k_norm)), 2)
        query_key = rotate(query_key, span.cos, span.sin)
        cache.write(index, positions.slots, query_key[:, :, heads:], value)
        return query_key[:, :, :heads]

    def _mlp(self, weights: LayerWeights[Linear], x: Tensor) -> Tensor:
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
