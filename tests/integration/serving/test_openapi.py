"""The server against its own description: whatever a client sends, no answer is a 5xx."""

from typing import Any

import pytest
from servers import Served

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

EXAMPLES = 40
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{name}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/version",
    "/metrics",
)


@pytest.fixture(scope="module")
def described(demo: Served) -> Any:
    return schemathesis.openapi.from_url(f"{demo.address}/openapi.json")


def test_every_route_is_described(demo: Served) -> None:
    with demo.client() as http:
        description = http.get("/openapi.json").json()
    assert set(PATHS) <= set(description["paths"])
    fields = description["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "temperature", "exit_layer", "generation_strategy"} <= set(fields)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", PATHS)
def test_no_request_breaks_the_server(described: Any, demo: Served, path: str, mode: str) -> None:
    operations = [each.ok() for each in described.get_all_operations() if each.ok().path == path]
    assert operations
    for operation in operations:
        if mode == "negative" and not operation.body:
            continue  # any name in a path is a proper one

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        )
        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        def check(case: Any) -> None:
            answer = case.call(base_url=demo.address, timeout=60)
            assert answer.status_code < 500, answer.text

        check()
    with demo.client() as http:
        assert http.get("/health").status_code == 200
