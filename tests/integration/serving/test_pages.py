"""The page that describes the API, and clients that don't read."""

import json
import socket
import time
from pathlib import Path

import pytest
from servers import Served, serving


def test_the_page_names_every_route_and_field(demo: Served) -> None:
    with demo.client() as http:
        page = http.get("/docs")
        description = http.get("/openapi.json").json()
        style = http.get("/reference.css")
    assert page.headers["content-type"].startswith("text/html")
    assert style.status_code == 200
    assert "<script" not in page.text
    assert "://" not in page.text  # nothing comes from elsewhere
    for path in description["paths"]:
        assert f"<code>{path}</code>" in page.text
    for name in description["components"]["schemas"]["ChatBody"]["properties"]:
        assert f"<code>{name}</code>" in page.text
    assert "Divides the logits; 0 is greedy." in page.text


@pytest.mark.slow
def test_a_client_that_does_not_read_does_not_keep_others_out(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--max-concurrency", "4") as server:
        host, port = server.address.removeprefix("http://").split(":")
        body = json.dumps(
            {
                "prompt": "def f(",
                "n": 32,
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": True,
                "logprobs": 20,
                "temperature": 1,
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
            time.sleep(2)
            with server.client() as http:
                assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        with server.client() as http:
            deadline = time.monotonic() + 10
            while 'layerskip:num_requests_running{model_name="demo"} 0.0' not in http.get("/metrics").text:
                assert time.monotonic() < deadline, "the client's places are still taken"
                time.sleep(0.1)
