"""What clients get wrong, by accident or on purpose: a 4xx in OpenAI's shape, and the others are served."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Served, serving

PATH = "/v1/completions"
GOOD = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}


def post(server: Served, body: Any, path: str = PATH, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client() as http:
        return http.post(path, content=raw, headers={"Content-Type": "application/json", **headers})


def refused(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": 3}, "prompt", "got 3"),
        ({"prompt": [1, "a"]}, "prompt[1]", "integer"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [999_999]}, "prompt", "999999"),
        ({"prompt": "\ud800"}, None, "isn't JSON"),
        ({"prompt": "word " * 3000}, "prompt", "shorten"),
        ({"prompt": ["x"] * 200}, "prompt", "128 texts"),
        ({**GOOD, "max_tokens": -1}, "max_tokens", "greater"),
        ({**GOOD, "max_tokens": 0}, "max_tokens", "echo"),
        ({**GOOD, "max_tokens": 4.5}, "max_tokens", "integer"),
        ({**GOOD, "max_tokens": "4"}, "max_tokens", "integer"),
        ({**GOOD, "max_tokens": True}, "max_tokens", "integer"),
        ({**GOOD, "max_tokens": 10**30}, "max_tokens", ""),
        ({**GOOD, "temperature": -0.1}, "temperature", "greater"),
        ({**GOOD, "temperature": 2.5}, "temperature", "less"),
        ({**GOOD, "top_p": 0}, "top_p", "greater"),
        ({**GOOD, "top_p": 1.01}, "top_p", "less"),
        ({**GOOD, "n": 0}, "n", "greater"),
        ({**GOOD, "n": 129}, "n", "less"),
        ({**GOOD, "best_of": 5}, "best_of", "equal n"),
        ({**GOOD, "suffix": "x"}, "suffix", "supported"),
        ({**GOOD, "seed": 2**80}, "seed", ""),
        ({**GOOD, "logprobs": 21}, "logprobs", "20"),
        ({**GOOD, "stop": ["a"] * 17}, "stop", "16"),
        ({**GOOD, "stop": ["a" * 257]}, "stop", "256"),
        ({**GOOD, "stop": 5}, "stop", "got 5"),
        ({**GOOD, "logit_bias": {"a": 1}}, "logit_bias", "ids"),
        ({**GOOD, "logit_bias": {"99999": 1}}, "logit_bias", "ids"),
        ({**GOOD, "logit_bias": {"1": 101}}, "logit_bias.1", "less"),
        ({**GOOD, "exit_layer": 0}, "exit_layer", "greater"),
        ({**GOOD, "exit_layer": 99}, None, "exit_layer"),
        ({**GOOD, "num_speculations": 0}, "num_speculations", "greater"),
        ({**GOOD, "generation_strategy": "magic"}, "generation_strategy", "adaptive"),
        ({**GOOD, "generation_strategy": "autoregressive", "exit_layer": 2}, "generation_strategy", "exit_layer"),
        ({**GOOD, "top_k": -1}, "top_k", "greater"),
        ({**GOOD, "min_p": 2}, "min_p", "less"),
        ({**GOOD, "repetition_penalty": 0}, "repetition_penalty", "greater"),
        ({**GOOD, "frequency_penalty": 3}, "frequency_penalty", "less"),
        ({**GOOD, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({**GOOD, "stream": "yes"}, "stream", "boolean"),
        ({**GOOD, "colour": "red"}, "colour", "not known"),
        (
            {**GOOD, "stream": True, "stream_options": {"include_sugar": True}},
            "stream_options.include_sugar",
            "not known",
        ),
        ({**GOOD, "model": 3}, "model", "string"),
        ([], None, "body"),
        ("text", None, "body"),
        (None, None, "body"),
    ],
)
def test_a_wrong_field_is_named(demo: Served, body: Any, param: str | None, words: str) -> None:
    assert words in refused(post(demo, body), 400, param)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"prompt": ' + b'{"a":' * 70 + b"1" + b"}" * 71, 400),
        (b'{"prompt": "' + b"a" * (5 * 2**20) + b'"}', 413),
    ],
)
def test_bodies_that_are_no_proper_json(demo: Served, raw: bytes, status: int) -> None:
    refused(post(demo, raw), status)
    assert post(demo, GOOD).status_code == 200


def test_other_kinds_of_bodies_paths_and_methods(demo: Served) -> None:
    refused(post(demo, b"prompt=x", **{"Content-Type": "application/x-www-form-urlencoded"}), 415)
    refused(post(demo, {**GOOD, "model": "gpt-5"}), 404, "model")
    with demo.client() as http:
        refused(http.get("/v1/nothing"), 404)
        refused(http.get(PATH), 405)
        refused(http.delete("/v1/models"), 405)


def test_a_chat_needs_a_template(demo: Served) -> None:
    answer = post(demo, {"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions")
    assert "chat template" in refused(answer, 400)


def test_a_chat_has_a_limit_of_messages(demo: Served) -> None:
    messages = [{"role": "user", "content": "hi"}] * 2049
    assert "2048" in refused(post(demo, {"messages": messages}, "/v1/chat/completions"), 400, "messages")


def test_other_sites_and_names_are_refused(demo: Served) -> None:
    assert "other sites" in refused(post(demo, GOOD, Origin="https://evil.example"), 403)
    refused(post(demo, GOOD, Origin="null"), 403)
    assert "Host" in refused(post(demo, GOOD, Host="evil.example"), 403)
    assert post(demo, GOOD, Origin=demo.address).status_code == 200


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with keys and short limits."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.txt").write_text("# keys\nfirst-secret-key\n\nsecond-secret-key\n")
    with serving(folder, "demo", "--api-key-file", str(folder / "keys.txt"), "--max-concurrency", "2") as server:
        yield server


def test_a_key_is_needed_for_all_but_health(guarded: Served) -> None:
    with guarded.client() as http:
        assert http.get("/health").status_code == 200
        for path in ("/", "/v1/models", "/metrics", "/docs", "/openapi.json", "/version", "/nothing"):
            refused(http.get(path), 401)
    wrong = "first-secret-kex", "first-secret-key2", "x"
    for key in wrong:
        refused(post(guarded, GOOD, Authorization=f"Bearer {key}"), 401)
    refused(post(guarded, GOOD, Authorization="first-secret-key"), 401)
    refused(post(guarded, GOOD, Authorization="Basic %%%"), 401)
    for key in ("first-secret-key", "second-secret-key"):
        assert post(guarded, GOOD, Authorization=f"Bearer {key}").status_code == 200
    with guarded.client(auth=("", "first-secret-key")) as http:  # as a browser sends it
        assert http.get("/v1/models").status_code == 200


def test_slow_connections_do_not_keep_others_out(demo: Served) -> None:
    host, port = demo.address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(1000)]
    try:
        for number, each in enumerate(slow):
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"[: 5 + number % 30])
        assert post(demo, GOOD).status_code == 200
        slow[0].settimeout(20)
        assert b"408" in slow[0].recv(1000)
        assert post(demo, GOOD).status_code == 200
    finally:
        for each in slow:
            each.close()


def test_endless_headers_are_refused(demo: Served) -> None:
    host, port = demo.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        answer = b""
        try:
            for number in range(5000):
                connection.sendall(f"x-{number}: {'a' * 100}\r\n".encode())
        except OSError:
            pass
        try:
            answer = connection.recv(1000)
        except TimeoutError:
            pytest.fail("the server still waits for the end of the headers")
        except ConnectionError:
            return  # closed without an answer: its head is still being sent
        assert b"431" in answer or answer == b""


def test_a_full_queue_answers_503(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("full"), "demo", "--max-concurrency", "1", "--max-queue", "1") as server:
        answers: list[Any] = []
        body = {**GOOD, "max_tokens": 600, "ignore_eos": True}
        threads = [threading.Thread(target=lambda: answers.append(post(server, body))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert codes[-1] == 503
        full = next(answer for answer in answers if answer.status_code == 503)
        assert full.headers["retry-after"] == "1"
        refused(full, 503)


def test_clients_that_leave_free_their_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    def metric(http: Any, name: str) -> float:
        found = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"layerskip:{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    with serving(tmp_path_factory.mktemp("leave"), "demo", "--max-concurrency", "1") as server, server.client() as http:
        host, port = server.address.removeprefix("http://").split(":")
        for number, stream in enumerate((True, False), start=1):
            # Texts one after the other: far more than can be written while the client is there.
            body = json.dumps({**GOOD, "max_tokens": 900, "n": 100, "stream": stream, "ignore_eos": True}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n"
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                while not metric(http, "num_requests_running"):
                    time.sleep(0.01)
            left = time.monotonic()
            while metric(http, "num_requests_"):  # running and waiting
                assert time.monotonic() - left < 1
                time.sleep(0.01)
            assert metric(http, 'request_success_total{finished_reason="abort"') > 50 * number
        assert post(server, GOOD).status_code == 200
