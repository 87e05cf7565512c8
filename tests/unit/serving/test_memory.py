from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.serving import memory
from layerskip.serving.config import ServerConfig
from layerskip.serving.memory import plan_cache

TOKEN = 1000  # bytes


def decoder(max_context: int = 8192) -> Any:
    return SimpleNamespace(
        max_context=max_context,
        device=torch.device("cpu"),
        cache_bytes=lambda rows, capacity: rows * (capacity + 1) * TOKEN,
    )


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"bytes": 10**9}
    monkeypatch.setattr(memory, "free_memory", lambda _: found["bytes"])
    return found


def test_the_model_decides_where_there_is_room() -> None:
    plan = plan_cache(decoder(1024), ServerConfig())
    assert (plan.rows, plan.capacity) == (16, 1024)
    assert plan.bytes == plan.prefix_bytes == 16 * 1025 * TOKEN


def test_the_memory_decides_where_there_is_little() -> None:
    plan = plan_cache(decoder(100_000), ServerConfig())
    assert plan.rows == 16
    assert plan.capacity == int(0.8 * 0.25 * 10**9 / (16 * TOKEN)) - 1
    assert plan.bytes + plan.prefix_bytes <= 0.25 * 10**9
    assert plan.prefix_bytes >= 0.15 * 0.25 * 10**9


@pytest.mark.parametrize("gigabytes", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("length", [None, 512, 2000])
def test_what_is_allowed_is_used_and_no_more(gigabytes: float, length: int | None) -> None:
    config = ServerConfig(cache_memory=gigabytes, max_model_len=length, max_concurrency=8)
    budget = gigabytes * 2**30
    plan = plan_cache(decoder(), config)
    assert plan.capacity == (length or plan.capacity)
    assert 0.97 * budget <= plan.bytes + plan.prefix_bytes <= budget


def test_what_does_not_fit_is_refused(free: dict[str, int]) -> None:
    with pytest.raises(OutOfMemoryError, match="--max-concurrency"):
        plan_cache(decoder(), ServerConfig(cache_memory=0.001))
    with pytest.raises(OutOfMemoryError, match="16 texts of 4000 tokens"):
        plan_cache(decoder(), ServerConfig(cache_memory=0.05, max_model_len=4000))
    with pytest.raises(InvalidArgumentError, match="context of 8192"):
        plan_cache(decoder(), ServerConfig(max_model_len=8193))
    free["bytes"] = 10**6
    with pytest.raises(OutOfMemoryError, match="256 tokens"):
        plan_cache(decoder(), ServerConfig())


def test_a_short_length_may_be_asked_for() -> None:
    assert plan_cache(decoder(), ServerConfig(max_model_len=64)).capacity == 64


def test_a_short_context_needs_no_more_than_itself() -> None:
    assert plan_cache(decoder(64), ServerConfig()).capacity == 64
