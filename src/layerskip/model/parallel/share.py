"""What each rank of tensor parallelism has of a network: the cutting plan as data, and the parts that follow from it.

A matrix whose outputs are cut (query, key, value, gate, up) needs nothing from other ranks; one whose inputs are cut
(attention's output, down) gives a partial sum of every output, and the ranks' sums are added: two reductions a layer.
Source: arXiv:1909.08053, section 3.

Heads don't have to divide evenly. Ranks get whole groups of query heads that share keys, or where there are fewer
groups than ranks, consecutive query heads and copies of the key/value heads that they read. Ranks beyond the number of
query heads have one too, with the same weights in all layers, whose output isn't added. The MLP is cut so that all
ranks have about as many weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import gcd
from types import MappingProxyType
from typing import Literal

from layerskip.errors import InvalidArgumentError
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.parallel.group import RankGroup

Axis = Literal["heads", "kv_heads", "mlp", "expert", "vocabulary"]
"""What a dimension of a weight consists of."""

OUTPUTS: Literal[0] = 0
INPUTS: Literal[1] = 1
"""Dimensions of a weight [O, I]."""


@dataclass(frozen=True)
class Cut:
    """How a weight is cut: along one dimension, of which consecutive segments may consist of different things."""

    dim: Literal[0, 1]
    """0: outputs. 1: inputs, so that the ranks' products are partial sums."""
    segments: tuple[Axis, ...]


CUTS: Mapping[str, Cut] = MappingProxyType(
    {
        "qkv": Cut(OUTPUTS, ("heads", "kv_heads", "kv_heads")),
        "o": Cut(INPUTS, ("heads",)),
        "gate_up": Cut(OUTPUTS, ("mlp", "mlp")),
        "down": Cut(INPUTS, ("mlp",)),
        "expert gate_up": Cut(OUTPUTS, ("expert", "expert")),
        "expert down": Cut(INPUTS, ("expert",)),
        "joint q_norm": Cut(OUTPUTS, ("heads",)),
        "joint k_norm": Cut(OUTPUTS, ("kv_heads",)),
        "table": Cut(OUTPUTS, ("vocabulary",)),
    }
)
"""By our name of a weight (`config.families`); `expert` ones are those of each expert, `joint` norms span all heads,
and `table` is the embedding or the head. All other weights are replicated, routers among them."""

MLP_UNITS = (32, 16, 8, 4, 2, 1)
"""Channels of the MLP that stay together: blocks of quantized inputs and panels of kernels, where it is wide enough."""
VOCABULARY_UNIT = 16
"""Tokens of the vocabulary that stay together, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a network."""

    rank: int
    num_ranks: int
    config: ModelConfig
    """Sizes of the part: as if it were a network of its own."""
    heads: tuple[int, ...]
    """Query heads of the whole network."""
    adds_heads: bool
    """Whether these count; not where another rank has them as well."""
    kv_heads: tuple[int, ...]
    """Key/value heads of the whole network; one may come twice."""
    owned: tuple[bool, ...]
    """For each of these whether it is the first copy in all ranks: where values are added up, only that one counts."""
    mlp: range
    """Channels of the MLP."""
    expert: range
    """Channels of each expert; empty where there are none."""
    vocabulary: range
    """Token ids."""

    def parts(self, axis: Axis, head_dim: int) -> tuple[range, ...]:
        """Consecutive outputs or inputs of the whole weight that this rank has of a segment, in its own order."""
        match axis:
            case "mlp":
                return (self.mlp,)
            case "expert":
                return (self.expert,)
            case "vocabulary":
                return (self.vocabulary,)
            case "heads":
                return tuple(range(run.start * head_dim, run.stop * head_dim) for run in runs(self.heads))
            case _:
                return tuple(range(run.start * head_dim, run.stop * head_dim) for run in runs(self.kv_heads))


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How this process takes part in running a network."""

    group: RankGroup
    config: ModelConfig
    """The whole network."""
    share: Share
    """What this rank has of it."""
    vocabulary: tuple[int, ...]
    """Tokens of each rank's part of the vocabulary."""
    num_whole: int = 0
    """First layers that every rank has whole."""

    def config_of(self, layer: int) -> ModelConfig:
        """Sizes of a layer in this rank."""
        return self.config if layer < self.num_whole else self.share.config

    @property
    def cache_config(self) -> ModelConfig:
        """Sizes of a cache with room for the keys and values of every layer."""
        heads = max(config.num_key_value_heads for config in (self.config_of(0), self.share.config))
        return replace(self.share.config, num_key_value_heads=heads)

    @property
    def counted(self) -> list[float]:
        """1 for each of this rank's query heads, then key/value heads; 0 if another rank has the head that counts."""
        share = self.share
        return [float(share.adds_heads)] * len(share.heads) + [float(owned) for owned in share.owned]

    @classmethod
    def of(cls, group: RankGroup, config: ModelConfig, num_whole: int = 0) -> "Membership":
        """Cut a network for a group of ranks, but for its first layers; raises as `shares`."""
        every = shares(config, group.size)
        sizes = tuple(len(share.vocabulary) for share in every)
        return cls(group=group, config=config, share=every[group.rank], vocabulary=sizes, num_whole=num_whole)


def runs(numbers: Sequence[int]) -> list[range]:
    """Consecutive ascending numbers as ranges: 1, 2, 2, 3 -> 1..2, 2..3."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def shares(config: ModelConfig, num_ranks: int) -> list[Share]:
    """Cut a network into parts.

    Args:
        config: The whole network.
        num_ranks: N.

    Raises:
        InvalidArgumentError: More ranks than channels of the MLP or tokens, or more than twice as many as heads.
    """
    limits: dict[str, int] = {
        "attention heads": 2 * config.num_attention_heads,
        "channels of the MLP": config.intermediate_size,
        "tokens of the vocabulary": config.vocab_size,
    }
    if config.sparse_layers:
        limits["channels of an expert"] = config.moe_intermediate_size
    for name, limit in limits.items():
        if not 1 <= num_ranks <= limit:
            raise InvalidArgumentError(
                f"tensor_parallel {num_ranks} is too much for this model's {name}; use 1 to {min(limits.values())}"
            )
    heads = _cut_heads(config, num_ranks)
    last = config.num_attention_heads
    kv_heads = [_read_by(part, config.num_attention_heads // config.num_key_value_heads) for part in heads]
    mlp = _cut_mlp(config, heads, kv_heads)
    unit = VOCABULARY_UNIT if config.vocab_size >= 4 * VOCABULARY_UNIT * num_ranks else 1
    experts = [range(0)] * num_ranks
    if config.sparse_layers:
        experts = _cut(config.moe_intermediate_size, [1.0] * num_ranks, _unit(config.moe_intermediate_size, num_ranks))
    vocabulary = _cut(config.vocab_size, [1.0] * num_ranks, unit)
    seen: set[int] = set()
    found = []
    for rank in range(num_ranks):
        owned = []
        for head in kv_heads[rank]:
            owned.append(head not in seen)
            seen.add(head)
        own = replace(
            config,
            num_attention_heads=len(heads[rank]),
            num_key_value_heads=len(kv_heads[rank]),
            intermediate_size=len(mlp[rank]),
            moe_intermediate_size=len(experts[rank]),
            vocab_size=len(vocabulary[rank]),
        )
        found.append(
            Share(
                rank=rank,
                num_ranks=num_ranks,
                config=own,
                heads=tuple(heads[rank]),
                adds_heads=rank < last,
                kv_heads=kv_heads[rank],
                owned=tuple(owned),
                mlp=mlp[rank],
                expert=experts[rank],
                vocabulary=vocabulary[rank],
            )
        )
    return found


def _cut_heads(config: ModelConfig, num_ranks: int) -> list[range]:
    """Query heads of each rank: whole groups that share keys, if there are enough groups."""
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    if heads < num_ranks:
        return [range(rank % heads, rank % heads + 1) for rank in range(num_ranks)]
    if groups < num_ranks:
        return _cut(heads, [1.0] * num_ranks, 1)
    size = heads // groups
    return [range(part.start * size, part.stop * size) for part in _cut(groups, [1.0] * num_ranks, 1)]


def _read_by(heads: range, group: int) -> tuple[int, ...]:
    """Key/value heads that query heads read, each for as many of them; copies where the groups are cut unevenly."""
    lengths = [(kv_head, len(list(members))) for kv_head, members in groupby(head // group for head in heads)]
    size = gcd(*(length for _, length in lengths))
    return tuple(kv_head for kv_head, length in lengths for _ in range(length // size))


def _cut_mlp(config: ModelConfig, heads: Sequence[range], kv_heads: Sequence[tuple[int, ...]]) -> list[range]:
    """Channels of the MLP for each rank: those with less of attention get more."""
    channels, num_ranks = config.intermediate_size, len(heads)
    unit = _unit(channels, num_ranks)
    # A layer's weights over the width: 2 head_dim for each head of either kind, and 3 for each channel of the MLP.
    attention = [
        2 * config.head_dim * (len(own) + len(kv)) if rank < config.num_attention_heads else 0  # one for all layers
        for rank, (own, kv) in enumerate(zip(heads, kv_heads, strict=True))
    ]
    each = (sum(attention) + 3 * channels) / num_ranks
    return _cut(channels, [max(each - part, 3.0 * unit) for part in attention], unit)


def _unit(channels: int, num_ranks: int) -> int:
    """Channels of an MLP that stay together."""
    return next(unit for unit in MLP_UNITS if channels % unit == 0 and (channels // unit >= 8 * num_ranks or unit == 1))


def _cut(count: int, weights: Sequence[float], unit: int) -> list[range]:
    """Cut 0..count-1 at multiples of a unit, by weights; no part is empty."""
    units, total = -(-count // unit), sum(weights)
    ends = [round(units * end / total) for end in accumulate(weights)]
    for rank in range(len(ends)):  # at least one each
        least = (ends[rank - 1] if rank else 0) + 1
        ends[rank] = min(max(ends[rank], least), units - (len(ends) - 1 - rank))
    starts = [0, *ends[:-1]]
    return [range(start * unit, min(end * unit, count)) for start, end in zip(starts, ends, strict=True)]
