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
from layerskip.model.parallel.share import Membership
from layerskip.model.positions import Placement, ValueSource
from layerskip.model.rope import rotate
from layerskip.model.torch.attention import attend
from layerskip.model.torch.experts import Experts, run_experts
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

    attention_norm: Tensor | None = None
    qkv: Linear_co
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o: Linear_co
    post_attention_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    gate_up: Linear_co | None = None
    down: Linear_co | None = None
    experts: Experts[Linear_co] | None = None
    """In place of `gate_up` and `down`, in a layer that has them."""
    post_mlp_norm: Tensor | None = None

    @property
    def gated(self) -> tuple[tuple[Linear_co, Linear_co], ...]:
        """The MLP's `gate_up` and `down`, or those of each expert."""
        if self.experts is not None:
            return tuple((expert.gate_up, expert.down) for expert in self.experts.experts)
        assert self.gate_up is not None
        assert self.down is not None
        return ((self.gate_up, self.down),)

    @property
    def num_bytes(self) -> int:
        """Bytes that the products of one token read."""
        values = None if self.fusion is None else self.fusion.values
        own = (self.input, values, self.qkv, self.o, self.gate_up, self.down, self.experts)
        return sum(part.num_bytes for part in own if part is not None)


class TorchNetwork:
    """Layers and head, operator by operator (`network.Network`)."""

    kernels = "torch"

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: Sequence[LayerWeights[Linear]],
        final_norm: Tensor,
        head: Linear,
        member: Membership | None = None,
    ) -> None:
        """Put loaded weights together.

        Args:
            config: Sizes and switches.
            layers: L layers, then those of the exit adapters.
            final_norm: [D].
            head: D -> V.
            member: The processes that share the network, if several do.
        """
        self.config = config
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self._member = member
        self._counted = None if member is None else torch.tensor(member.counted, device=final_norm.device)
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
            fused = fuse(
                fusion,
                *positions.sources(cache, source),
                cache,
                None if self._member is None else self._member.group.sum,
            )
            return self._run_layer(layer, hidden, positions, cache, fused)

    def write_keys(self, layer: int, hidden: Tensor, positions: Placement, cache: KVCache) -> None:
        """Write a layer's keys and values for its input [B, Q, D]."""
        weights = self.layers[layer]
        hidden = hidden if weights.input is None else weights.input(hidden)
        self._project(layer, self._normed(hidden, weights.attention_norm), positions, cache)

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
        out = self._attention(index, self._normed(hidden, weights.attention_norm), positions, cache)
        hidden = self._add(hidden, self._normed(out, weights.post_attention_norm))
        if fused is not None:
            hidden = self._add(hidden, fused)
        out = self._mlp(index, self._normed(hidden, weights.mlp_norm))
        return self._add(hidden, self._normed(out, weights.post_mlp_norm))

    def _add(self, hidden: Tensor, out: Tensor) -> Tensor:
        return torch.add(hidden, out, alpha=self.config.residual_multiplier)

    def _attention(self, index: int, x: Tensor, positions: Placement, cache: KVCache) -> Tensor:
        config = self._config_of(index)
        span = positions.span(config.attention_of(index))
        query = self._project(index, x, positions, cache)
        out = attend(query, cache, index, span, config.attention_scale, config.num_key_value_heads)
        return self._summed(index, self.layers[index].o(out))

    def _config_of(self, index: int) -> ModelConfig:
        """Sizes of a layer: processes that share a network have some layers whole and parts of the others."""
        return self.config if self._member is None else self._member.config_of(index)

    def _summed(self, index: int, out: Tensor) -> Tensor:
        """A layer's output, which is a partial sum where several processes have parts of the layer."""
        return out if self._member is None or index < self._member.num_whole else self._member.group.sum(out)

    def _project(self, index: int, x: Tensor, positions: Placement, cache: KVCache) -> Tensor:
        """Queries [B, Q, H, D_head]; keys and values go into the cache."""
        config, weights = self._config_of(index), self.layers[index]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        span = positions.span(config.attention_of(index))
        qkv = weights.qkv(x).view(*x.shape[:2], heads + 2 * kv_heads, config.head_dim)
        query_key, value = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            query_key = self._norm_heads(index, query_key, weights.q_norm, weights.k_norm)
        if config.rotates(index):
            query_key = rotate(query_key, span.cos, span.sin)
        cache.write(index, positions.slots, query_key[:, :, heads:], value)
        return query_key[:, :, :heads]

    def _mlp(self, index: int, x: Tensor) -> Tensor:
        weights = self.layers[index]
        if weights.experts is not None:
            out = run_experts(weights.experts, x, self._gated, norm_weights=self.config.norm_topk_prob)
        else:
            out = self._gated(*weights.gated[0], x)
        return self._summed(index, out)

    def _gated(self, gate_up: Linear, down: Linear, x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, -1)
        match self.config.hidden_act:
            case "silu":
                gate = F.silu(gate)
            case "gelu_pytorch_tanh":
                gate = F.gelu(gate, approximate="tanh")
            case _:
                gate = F.gelu(gate)
        return down(gate.mul_(up))

    def _normed(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else self._norm(x, norm)

    def _norm_heads(self, index: int, x: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
        """Queries and keys [B, Q, H + H_kv, D_head], normalized head by head, or all heads of a token together."""
        config = self._config_of(index)
        heads = config.num_attention_heads
        parts = (x[:, :, :heads], query_weight), (x[:, :, heads:], key_weight)
        if not config.joint_qk_norm:
            return torch.cat([self._norm(part, weight) for part, weight in parts], 2)
        if self._member is None or index < self._member.num_whole:
            return torch.cat([self._norm(part.flatten(2), weight).view_as(part) for part, weight in parts], 2)
        return self._norm_heads_of_all(x, torch.cat((query_weight, key_weight)), self._member)

    def _norm_heads_of_all(self, x: Tensor, weight: Tensor, member: Membership) -> Tensor:
        """The same where other processes have some of the heads: the squares of all are added up first."""
        assert self._counted is not None
        heads, all_heads = self.config.num_attention_heads, member.config.num_attention_heads
        squares = x.float().square().sum(-1) * self._counted
        sums = torch.stack((squares[..., :heads].sum(-1), squares[..., heads:].sum(-1)), -1)
        channels = torch.tensor([all_heads, member.config.num_key_value_heads], device=x.device) * x.shape[-1]
        scale = (member.group.sum(sums) / channels + self.config.rms_norm_eps).rsqrt()
        by_head = scale.repeat_interleave(torch.tensor([heads, x.shape[2] - heads], device=x.device), -1)
        return (x.float() * by_head.unsqueeze(-1) * weight.view(x.shape[2:])).to(x.dtype)

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
