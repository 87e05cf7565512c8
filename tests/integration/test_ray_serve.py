"""Several replicas on a Ray cluster answer as one server does."""

import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from itertools import pairwise
from typing import Any

import pytest

from layerskip.language_model import load
from layerskip.serving.config import ServerConfig
from layerskip.serving.ray_app import build_app

pytestmark = pytest.mark.slow

MODEL = {"model": "demo", "dtype": "float32", "cache_memory": 0.2}
BODIES = [
    {"prompt": f"def f{i}({'a, ' * (i % 4)}b):", "max_tokens": 20 + i, **options}
    for i in range(6)
    for options in ({"temperature": 0}, {"temperature": 0.8, "seed": i}, {"temperature": 0, "exit_layer": 2})
]
CLIENTS = 8
MOST_RETRIES = 20
TRANSIENT = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Ray Serve on a cluster of two cores that this process has joined."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve", exc_type=ImportError)
    pytest.importorskip("psutil")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def two(address: str) -> str:
    """The address of two replicas."""
    deploy(num_replicas="2")
    return address


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What one server answers, one request after the other."""
    testclient = pytest.importorskip("starlette.testclient")
    from layerskip.serving.app import create_app

    app = create_app(load("demo", dtype="float32"), ServerConfig(cache_memory=0.2))
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        answers = [client.post("/v1/completions", json=body) for body in BODIES]
    return [answer.json()["choices"][0]["text"] for answer in answers]


def deploy(**settings: Any) -> None:
    """Run this in place of what ran before."""
    from ray import serve

    serve.run(build_app({**MODEL, **settings}))


def request_of(address: str, body: dict[str, Any], headers: dict[str, str]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", **headers}
    return urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)


def post(address: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    with urllib.request.urlopen(request_of(address, body, headers), timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def complete(address: str, body: dict[str, Any]) -> str:
    text: str = post(address, body)["choices"][0]["text"]
    return text


def stream(address: str, body: dict[str, Any]) -> tuple[str, list[float]]:
    """The text of a stream, and when its pieces came."""
    text, times = "", []
    with urllib.request.urlopen(request_of(address, {**body, "stream": True}, {}), timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: [DONE]"):
                return text, times
            if line.startswith(b"data: "):
                text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
                times.append(time.monotonic())
    raise ConnectionError("the stream ended without [DONE]")


def replicas() -> list[Any]:
    """The processes of all replicas of this process's cluster."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline() and process.cmdline()[0].startswith("ray::ServeReplica"):
                found.append(process)
    return found


def wait_for(number: int) -> None:
    """Until so many replicas run, and no others, as Ray sees it."""
    from ray import serve

    end = time.monotonic() + 60
    while time.monotonic() < end:
        (status,) = serve.status().applications["default"].deployments.values()
        states = {str(getattr(state, "value", state)): count for state, count in status.replica_states.items()}
        if states == {"RUNNING": number}:
            return
        time.sleep(0.2)
    raise AssertionError(f"there are not {number} replicas: {status}")


def test_two_replicas_answer_as_one_server(two: str, expected: list[str]) -> None:
    processes = replicas()
    assert len(processes) == 2
    before = [process.cpu_times().user for process in processes]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert list(pool.map(lambda body: complete(two, body), BODIES)) == expected
            assert [text for text, _ in pool.map(lambda body: stream(two, body), BODIES)] == expected
    worked = [process.cpu_times().user - start for process, start in zip(processes, before, strict=True)]
    assert min(worked) > 0.1 * max(worked) > 0  # both took part


def test_streams_come_as_they_are_made(two: str) -> None:
    """Not all pieces at once in the end."""
    body = {"prompt": "def f(", "max_tokens": 400, "temperature": 0, "generation_strategy": "autoregressive"}
    start = time.monotonic()
    _, times = stream(two, body)
    assert len(times) > 50
    assert times[0] - start < 0.5 * (times[-1] - start)
    assert max(later - earlier for earlier, later in pairwise(times)) < 0.5 * (times[-1] - start)


def test_errors_pass_through(two: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(two, {"prompt": "x", "max_tokens": -1})
    assert refused.value.code == 400
    assert json.load(refused.value)["error"]["param"] == "max_tokens"
    with pytest.raises(urllib.error.HTTPError) as foreign:
        post(two, {"prompt": "x"}, Host="example.com")
    assert foreign.value.code == 403


class Load:
    """Clients that ask, and ask again where an answer fails for now."""

    def __init__(self, address: str, expected: list[str]) -> None:
        self.address, self.expected = address, expected
        self.answered, self.retried = 0, 0
        self.wrong: list[Any] = []
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        """One request, until it is answered."""
        place = number % len(BODIES)
        for _ in range(MOST_RETRIES):
            try:
                if number % 2:
                    text, _ = stream(self.address, BODIES[place])
                else:
                    text = complete(self.address, BODIES[place])
            except TRANSIENT as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    self.wrong.append((number, error.code, error.read()))
                    return
                with self._lock:
                    self.retried += 1
                time.sleep(0.3)
            else:
                with self._lock:
                    self.answered += 1
                if text != self.expected[place]:
                    self.wrong.append((number, text))
                return
        self.wrong.append((number, "never answered"))


def test_a_replica_killed_under_load_costs_retries_only(two: str, expected: list[str]) -> None:
    wait_for(2)
    clients, victim = Load(two, expected), replicas()[0]
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(clients.ask, number) for number in range(240)]
        while clients.answered < 40:
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        for one in running:
            one.result()
    print(f"{clients.retried} retries")
    assert clients.wrong == []
    assert clients.answered == 240
    assert clients.retried <= 3 * CLIENTS  # those that were open at the killed one, and perhaps some more of them
    wait_for(2)
    assert victim.pid not in {process.pid for process in replicas()}
    assert complete(two, BODIES[0]) == expected[0]


def test_replicas_that_are_replaced_end_what_they_have_begun(two: str, expected: list[str]) -> None:
    wait_for(2)
    before = {process.pid for process in replicas()}
    clients, stop = Load(two, expected), threading.Event()

    def client(start: int) -> None:
        number = start
        while not stop.is_set():
            clients.ask(number)
            number += 7

    threads = [threading.Thread(target=client, args=(start,)) for start in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        deploy(num_replicas=1)
        wait_for(1)
        answered = clients.answered
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert clients.wrong == []
    assert clients.retried == 0
    assert clients.answered > answered > 0
    assert before.isdisjoint(process.pid for process in replicas())


def test_a_session_stays_with_its_replica(address: str) -> None:
    """Only the first of its requests reads the prompt."""
    deploy(num_replicas=2, routing="session")
    wait_for(2)
    for session in range(6):
        prompt = f"# {session}\n" + "def add(a, b):\n    return a + b\n" * 8
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        answers = [post(address, body, **{"x-session-id": f"s{session}"}) for _ in range(5)]
        cached = [answer["metrics"]["cached_tokens"] for answer in answers]
        assert min(cached[1:]) > 0.5 * answers[0]["usage"]["prompt_tokens"], cached


def test_a_model_that_is_not_there_is_named(address: str) -> None:
    from ray import serve

    with pytest.raises(RuntimeError):
        deploy(model="/no/such/model")
    (status,) = serve.status().applications["default"].deployments.values()
    assert "layerskip can't serve '/no/such/model'" in status.message
    serve.delete("default")
