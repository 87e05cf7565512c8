"""Signals: requests that were accepted end with their text or a clean error, and the process ends in time."""

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from servers import Served, events, serving, start_server

BODY = {"prompt": "def f(", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


def ask(server: Served, answers: list[Any], body: dict[str, Any]) -> None:
    try:
        with server.client() as http:
            answers.append(http.post("/v1/completions", json=body))
    except httpx.HTTPError as error:
        answers.append(error)


def wait_until_taken(server: Served, number: int) -> None:
    """Until so many requests run or wait; running ones take seconds."""
    deadline = time.monotonic() + 20
    with server.client() as http:
        while time.monotonic() < deadline:
            lines = http.get("/metrics").text.splitlines()
            counts = [float(line.rpartition(" ")[2]) for line in lines if re.match(r"layerskip:num_requests_", line)]
            if sum(counts) >= number:
                return
    raise AssertionError(f"{number} requests were not taken: {counts}")


def begin(server: Served, number: int, **options: Any) -> tuple[list[Any], list[threading.Thread]]:
    answers: list[Any] = []
    bodies = [{**BODY, "stream": place % 2 == 0, **options} for place in range(number)]
    threads = [threading.Thread(target=ask, args=(server, answers, body)) for body in bodies]
    for thread in threads:
        thread.start()
    wait_until_taken(server, number)
    return answers, threads


def test_running_requests_end_with_their_texts(tmp_path: Path) -> None:
    with serving(tmp_path, "demo") as server:
        answers, threads = begin(server, 8)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with server.client() as http:  # still there, but for no new requests
            late = http.post("/v1/completions", json=BODY)
            health = http.get("/health")
        for thread in threads:
            thread.join()
        assert server.wait() == 0
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "shutting_down"
    assert health.status_code == 503
    texts = set()
    for answer in answers:
        assert answer.status_code == 200
        if "text/event-stream" in answer.headers["content-type"]:
            texts.add("".join(chunk["choices"][0]["text"] for chunk in events(answer.text.split("\n"))))  # type: ignore[index]
        else:
            texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1


def test_what_takes_too_long_ends_with_a_clean_error(tmp_path: Path) -> None:
    flags = ("--drain-timeout", "0.5", "--max-concurrency", "2")
    with serving(tmp_path, "demo", *flags) as server:
        answers, threads = begin(server, 8)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.wait() == 0
        assert time.monotonic() - started < 10
    for answer in answers:
        if "text/event-stream" in answer.headers["content-type"]:
            assert '"code":"shutting_down"' in answer.text or '"finish_reason":"length"' in answer.text
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.status_code in (200, 503)
    assert any("shutting_down" in answer.text for answer in answers)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--max-concurrency", "1") as server:
        _, threads = begin(server, 4)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        server.wait(10)
        assert time.monotonic() - started < 3
        for thread in threads:
            thread.join()


def test_after_a_kill_a_server_starts_at_the_same_port(tmp_path: Path) -> None:
    server = start_server(tmp_path, "demo")
    _, threads = begin(server, 3)
    server.process.kill()
    server.process.wait()
    for thread in threads:
        thread.join()
    port = server.address.rpartition(":")[2]
    with serving(tmp_path, "demo", "--port", port) as again, again.client() as http:
        assert again.address == server.address
        assert http.post("/v1/completions", json={**BODY, "max_tokens": 4}).status_code == 200


def test_bad_starts(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "short.txt").write_text("abc\n")
    with serving(tmp_path, "demo") as server:
        port = server.address.rpartition(":")[2]
        starts = {
            ("demo", "--port", port): "can't listen at 127.0.0.1",
            ("no-such-model",): "no-such-model",
            ("demo", "--port", "70000"): "port must be",
            ("demo", "--host", "0.0.0.0"): "--api-key-file",
            ("demo", "--api-key-file", "none.txt"): "can't be read",
            ("demo", "--api-key-file", str(tmp_path / "empty.txt")): "has no key",
            ("demo", "--api-key-file", str(tmp_path / "short.txt")): "line 1",
            ("demo", "--max-concurrency", "0"): "max_concurrency",
            ("demo", "--max-model-len", "5000"): "context of 1024",
            ("demo", "--cache-memory", "0.001"): "--cache-memory",
            ("demo", "--tensor-parallel", "2"): "one process",
        }
        for flags, words in starts.items():
            command = [sys.executable, "-m", "layerskip", "serve", *flags]
            run = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert run.returncode == 2, flags
            assert words in run.stderr, run.stderr
            assert "Traceback" not in run.stderr
