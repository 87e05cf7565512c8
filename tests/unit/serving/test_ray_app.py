"""Settings of servers on a Ray cluster."""

from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.serving.ray_app import RaySettings


def test_values_may_be_text() -> None:
    given = {
        "model": "demo",
        "num_replicas": "2",
        "max_replicas": "4",
        "target_requests": "2.5",
        "cache_memory": "0.5",
        "insecure": "True",
        "max_model_len": "none",
        "served_name": "2",
    }
    assert RaySettings.parse(given) == RaySettings(
        model="demo",
        num_replicas=2,
        max_replicas=4,
        target_requests=2.5,
        cache_memory=0.5,
        insecure=True,
        max_model_len=None,
        served_name="2",
    )


def test_values_may_be_what_they_are() -> None:
    settings = RaySettings.parse({"model": "1", "num_replicas": 2, "insecure": False, "cache_memory": 1.0})
    assert (settings.model, settings.num_replicas, settings.insecure, settings.cache_memory) == ("1", 2, False, 1.0)


def test_the_server_of_each_replica(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    config = RaySettings.parse({"model": "demo", "api_key_file": str(keys), "drain_timeout": "7"}).server_config()
    assert (config.api_key_file, config.drain_timeout, config.host) == (keys, 7.0, "127.0.0.1")
    assert RaySettings(model="demo", insecure=True).server_config().host == "0.0.0.0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the setting model is missing"),
        ({"model": "demo", "replicas": 2}, "no setting 'replicas' .*; there are model, num_replicas, "),
        ({"model": "demo", "num_replicas": "two"}, "num_replicas must be a whole number, got 'two'"),
        ({"model": "demo", "num_replicas": "0"}, "num_replicas must be a whole number of at least 1, got 0"),
        ({"model": "demo", "num_replicas": 1.5}, "num_replicas must be a whole number"),
        ({"model": "demo", "num_replicas": 3, "max_replicas": 2}, "max_replicas must be .* at least 3, got 2"),
        ({"model": "demo", "target_requests": 2}, "give max_replicas as well"),
        ({"model": "demo", "max_replicas": 2, "target_requests": "nan"}, "target_requests must be above 0, got nan"),
        ({"model": "demo", "num_gpus": 2}, "num_gpus must be .* at most 1, got 2"),
        ({"model": "demo", "insecure": "maybe"}, "insecure must be true or false, got 'maybe'"),
        ({"model": "demo", "routing": "prefix"}, "routing must be one of balanced, session, got 'prefix'"),
        ({"model": "demo", "cache_memory": "-1"}, "cache_memory must be above 0"),
        ({"model": "demo", "max_concurrency": "0"}, "max_concurrency must be"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        RaySettings.parse(given)
