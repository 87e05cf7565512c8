"""One rank's share of a checkpoint as a checkpoint of its own: of tensors that are cut, only parts are read.

Shapes: O output width, I input width, D width, S layers whose values an exit adapter reads.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from layerskip.checkpoint.loading.adapters import AdapterSet, tensor_name
from layerskip.checkpoint.loading.plan import LoadingPlan
from layerskip.checkpoint.loading.tensors import EMBEDDING, HEAD, Part, StoredTensor, TensorSource, check_shape
from layerskip.model.blocks import BlockFormat, BlockWeight, block_weights
from layerskip.model.config.families import FAMILIES
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.parallel.share import CUTS, INPUTS, OUTPUTS, Axis, Membership, Share

_LAYER = re.compile(r"(?:model\.layers\.(?P<layer>\d+)|exit_\d+\.layer)\.(?P<tensor>.+)\.(?P<kind>weight|bias)")
_EXPERT = re.compile(r"\.\d+\.")
_TOKENS = re.compile(r"exit_\d+\.token_ids")
_VALUES = re.compile(r"exit_\d+\.value_proj\.weight")


class ShareSource:
    """The tensors of one rank (`tensors.TensorSource`), under the names of the whole checkpoint's."""

    def __init__(self, source: TensorSource, member: Membership) -> None:
        """Take a checkpoint's tensors, or those of its exit adapters.

        Args:
            source: All tensors.
            member: What this rank has of the network.
        """
        self._source, self._config, self._share = source, member.config, member.share
        self._num_whole = member.num_whole
        config = member.config
        self._places = {
            tensor: (ours, place, len(theirs))
            for ours, theirs in _stored(config).items()
            for place, tensor in enumerate(theirs)
        }

    def names(self) -> frozenset[str]:
        """As the source."""
        return self._source.names()

    def stored(self, name: str) -> StoredTensor:
        """What the source says of the whole tensor, in the shape of this rank's part."""
        stored, cut = self._source.stored(name), self._cut(name)
        if cut is None:
            return stored
        dim, ranges = cut
        count = sum(map(len, ranges)) if ranges else self._config.hidden_size
        shape = (*stored.shape[:dim], count, *stored.shape[dim + 1 :])
        return replace(stored, shape=shape, num_bytes=stored.num_bytes * count // stored.shape[dim])

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """This rank's rows or columns of a tensor; `part` counts within them."""
        cut = self._cut(name)
        if _VALUES.fullmatch(name):
            tensor = self._values(self._source.get(name))
        elif _TOKENS.fullmatch(name):
            tensor = own_tokens(self._share, self._source.get(name))
        elif cut is None:
            return self._source.get(name, part)
        else:
            self._check(name)
            dim, ranges = cut
            tensors = [self._source.get(name, Part(dim, rows.start, rows.stop)) for rows in ranges]
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim) if tensors else self._bias(name)
            if self._is_not_added(name):
                tensor = torch.zeros_like(tensor)
        return tensor if part is None else tensor.narrow(part.dim, part.start, part.stop - part.start)

    def block_format(self, name: str) -> BlockFormat | None:
        """The source's, unless a part would cut blocks."""
        kept = self._source.block_format(name)
        cut = self._cut(name)
        if kept is None or cut is None:
            return kept
        if self._is_not_added(name):
            return None
        dim, ranges = cut
        size = block_weights(kept)
        whole = all(end % size == 0 for inputs in ranges for end in (inputs.start, inputs.stop))
        return kept if dim == OUTPUTS or whole else None

    def blocks(self, name: str, part: Part | None = None) -> BlockWeight:
        """This rank's rows or columns, in the source's blocks."""
        cut = self._cut(name)
        if cut is None:
            return self._source.blocks(name, part)
        assert part is None, part
        self._check(name)
        dim, ranges = cut
        found = [self._source.blocks(name, Part(dim, rows.start, rows.stop)) for rows in ranges]
        return found[0] if len(found) == 1 else BlockWeight(found[0].format, torch.cat([w.data for w in found], dim))

    def _check(self, name: str) -> None:
        """Raise `WeightsError` unless the whole tensor is of the size of which this rank knows its part."""
        match = _LAYER.fullmatch(name)
        ours, place, count = self._place(match["tensor"]) if match else ("table", 0, 1)
        cut, shape = CUTS[ours], self._source.stored(name).shape
        axes = cut.segments if count == 1 else cut.segments[place : place + 1]
        whole = sum(map(self._size, axes))
        if match is not None and match["kind"] == "bias":
            check_shape(name, shape, (whole if cut.dim == OUTPUTS else self._config.hidden_size,))
        elif shape[cut.dim : cut.dim + 1] != (whole,):
            check_shape(name, shape, (*shape[: cut.dim], whole, *shape[cut.dim + 1 :]))

    def _cut(self, name: str) -> tuple[Literal[0, 1], list[range]] | None:
        """The dimension along which a tensor is cut and what this rank has of it; None: the whole tensor.

        No ranges: a bias that is another rank's.
        """
        if name in (EMBEDDING, HEAD):
            return OUTPUTS, self._segments("table", 0, 1)
        match = _LAYER.fullmatch(name)
        ours, place, count = self._place(match["tensor"]) if match else ("", 0, 1)
        if match is None or ours not in CUTS or int(match["layer"] or self._num_whole) < self._num_whole:
            return None
        if match["kind"] == "bias" and CUTS[ours].dim == INPUTS:  # added once, to the sum of the ranks' products
            return OUTPUTS, [range(self._config.hidden_size)] if self._share.rank == 0 else []
        return CUTS[ours].dim, self._segments(ours, place, count)

    def _place(self, tensor: str) -> tuple[str, int, int]:
        """Our name of a weight, which of the tensors that make it up this one is, and of how many."""
        return self._places.get(_EXPERT.sub(".{}.", tensor), ("", 0, 1))

    def _segments(self, ours: str, place: int, count: int) -> list[range]:
        """Rows or columns of a tensor that holds one segment of a weight, or all of them one after the other."""
        axes = CUTS[ours].segments
        ranges, start = [], 0
        for axis in axes if count == 1 else axes[place : place + 1]:
            for own in self._share.parts(axis, self._config.head_dim):
                ranges.append(range(start + own.start, start + own.stop))
            start += self._size(axis)
        return ranges

    def _size(self, axis: Axis) -> int:
        """The whole network's rows or columns of one kind."""
        config = self._config
        match axis:
            case "heads":
                return config.num_attention_heads * config.head_dim
            case "kv_heads":
                return config.num_key_value_heads * config.head_dim
            case "mlp":
                return config.intermediate_size
            case "expert":
                return config.moe_intermediate_size
            case _:
                return config.vocab_size

    def _is_not_added(self, name: str) -> bool:
        """Whether a weight is that of heads which another rank adds."""
        match = _LAYER.fullmatch(name)
        ours = match is not None and self._place(match["tensor"])[0]
        return ours == "o" and self._cut(name) is not None and not self._share.adds_heads

    def _bias(self, name: str) -> Tensor:
        return torch.zeros(self._config.hidden_size, dtype=self._source.get(name, Part.rows(0, 1)).dtype)

    def _values(self, weight: Tensor) -> Tensor:
        """[D, S x all channels of values] -> [D, S x this rank's], 0 where another rank has a copy of the head."""
        heads, channels = self._config.num_key_value_heads, self._config.head_dim
        by_head = weight.view(weight.shape[0], -1, heads, channels)[:, :, list(self._share.kv_heads)]
        owned = torch.tensor(self._share.owned, dtype=weight.dtype)
        return (by_head * owned.view(1, 1, -1, 1)).flatten(1)


def take_share(
    config: ModelConfig, source: TensorSource, plan: LoadingPlan
) -> tuple[ModelConfig, TensorSource, LoadingPlan]:
    """What a rank of the plan's group loads, as if its share were a model of its own; raises as `shares`."""
    assert plan.group is not None
    member = Membership.of(plan.group, config, plan.replicate_layers)
    share, draft, adapters = member.share, plan.draft, plan.adapters
    if draft is not None and draft.tokens is not None:
        draft = replace(draft, tokens=tuple(own_tokens(share, draft.tokens).tolist()))
    if adapters is not None:
        adapters = share_adapters(adapters, member)
    plan = replace(plan, member=member, draft=draft, adapters=adapters)
    return share.config, ShareSource(source, member), plan


def share_adapters(adapters: AdapterSet, member: Membership) -> AdapterSet:
    """Exit adapters of which this rank has its share; each drafts among the tokens of the rank's vocabulary."""
    assert adapters.weights is not None
    source = ShareSource(adapters.weights, member)
    own = tuple(
        adapter
        if adapter.vocabulary_size is None
        else replace(adapter, vocabulary_size=len(source.get(tensor_name(adapter.exit_layer, "token_ids"))))
        for adapter in adapters.adapters
    )
    return replace(adapters, adapters=own, weights=source)


def _stored(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors of each weight, by its name in `CUTS`."""
    family = FAMILIES[config.model_type]
    stored = dict(family.weights)
    if config.joint_qk_norm:
        for norm in ("q_norm", "k_norm"):
            stored[f"joint {norm}"] = stored.pop(norm)
    if family.experts is not None:
        stored |= {"expert gate_up": family.experts.gate_up, "expert down": family.experts.down}
    return stored


def own_tokens(share: Share, tokens: Sequence[int] | Tensor) -> Tensor:
    """Of token ids, those of this rank's part of the vocabulary, counted from its start; at least one."""
    part = share.vocabulary
    ids = torch.as_tensor(tokens)
    own = ids[(ids >= part.start) & (ids < part.stop)] - part.start
    return own if len(own) else torch.zeros(1, dtype=torch.long)
