"""Cutting a network into parts."""

from dataclasses import replace
from typing import Any

import pytest
from tensor_sources import make_source

from layerskip.errors import InvalidArgumentError
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.parallel.share import Share, shares


def config_of(**changes: Any) -> ModelConfig:
    config, _ = make_source()
    return replace(config, **changes)


def heads_read(share: Share) -> list[tuple[int, int]]:
    """Pairs of a query head and the key/value head that it reads in this rank."""
    group = len(share.heads) // len(share.kv_heads)
    return [(head, share.kv_heads[place // group]) for place, head in enumerate(share.heads)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (6, 2), (3, 1), (5, 5), (12, 4)])
def test_every_head_is_added_once_and_reads_its_own_keys(num_ranks: int, heads: int, kv_heads: int) -> None:
    if num_ranks > 2 * heads:
        return
    config = config_of(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=704, vocab_size=1000)
    parts = shares(config, num_ranks)
    added = [head for part in parts if part.adds_heads for head in part.heads]
    assert added == list(range(heads))
    for part in parts:
        assert all(kv == head // (heads // kv_heads) for head, kv in heads_read(part))
        assert part.config.num_attention_heads == len(part.heads)
        assert part.config.num_key_value_heads == len(part.kv_heads)
    owners = [kv for part in parts for kv, owned in zip(part.kv_heads, part.owned, strict=True) if owned]
    assert sorted(owners) == list(range(kv_heads))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_mlp_and_vocabulary_are_cut_without_gaps(num_ranks: int) -> None:
    config = config_of(num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152)
    parts = shares(config, num_ranks)
    for ranges in ([part.mlp for part in parts], [part.vocabulary for part in parts]):
        assert [number for part in ranges for number in part] == list(range(ranges[-1].stop))
        assert all(part.start % 16 == 0 for part in ranges)
    assert parts[-1].mlp.stop == 1536
    assert parts[-1].vocabulary.stop == 49152


def test_ranks_with_less_of_attention_have_more_of_the_mlp() -> None:
    config = config_of(
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
    )
    first, second = shares(config, 2)
    assert (len(first.heads), len(second.heads)) == (6, 3)
    assert len(first.mlp) < len(second.mlp)
    weights = [64 * 2 * (len(part.heads) + len(part.kv_heads)) + 3 * len(part.mlp) for part in (first, second)]
    assert abs(weights[0] - weights[1]) < 0.02 * sum(weights)


def test_even_models_are_cut_evenly() -> None:
    config = config_of(num_attention_heads=8, num_key_value_heads=4, intermediate_size=512, vocab_size=1024)
    parts = shares(config, 4)
    assert {len(part.heads) for part in parts} == {2}
    assert {len(part.kv_heads) for part in parts} == {1}
    assert {len(part.mlp) for part in parts} == {128}
    assert {len(part.vocabulary) for part in parts} == {256}


@pytest.mark.parametrize(
    ("changes", "num_ranks", "what"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 7, "attention heads; use 1 to 6"),
        ({"intermediate_size": 3}, 4, "channels of the MLP; use 1 to 3"),
        ({"vocab_size": 2}, 3, "tokens of the vocabulary; use 1 to 2"),
    ],
)
def test_more_ranks_than_parts_are_refused(changes: dict[str, Any], num_ranks: int, what: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"tensor_parallel {num_ranks} is too much for this model's {what}"):
        shares(config_of(**changes), num_ranks)
