"""`layerskip bench-serve` against real HTTP servers: figures, failures, interruption, what goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Script, Served, serve

from layerskip.cli.main import main
from layerskip.evaluation.report.parts import reproduction

MODELS = Script(content={"object": "list", "data": [{"id": "a/model", "object": "model"}]})
PIECES = ("Once", " upon a time", ", in a", " land")
TOKENS = (1, 3, 2, 1)
SPECULATION = {"num_drafts": 2, "num_draft_tokens": 6, "num_accepted_tokens": 4}
HISTOGRAMS = {"acceptance_histogram": [2, 1, 1], "draft_histogram": [2, 2, 2]}


def stream(path: str, *, told: bool = True, **more: Any) -> Script:
    """A story of seven tokens in four pieces."""

    def chunk(text: str) -> dict[str, Any]:
        return {"choices": [{"delta": {"content": text}} if "chat" in path else {"text": text}]}

    chunks = [chunk(text) for text in PIECES]
    if told:
        for place, each in enumerate(chunks):
            each["speculation"] = {"tokens": [{"id": 1}] * TOKENS[place]}
        metrics = {"speculative_decoding": SPECULATION | HISTOGRAMS}
        chunks.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}, "metrics": metrics})
    return Script(chunks=(*chunks, "data: [DONE]\n\n"), **more)


def call(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any, str]:
    """Run the command with --json: exit code, what was printed, errors."""
    capfd.readouterr()
    code = main(["bench-serve", *argv, "--json"])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def test_figures(capfd: pytest.CaptureFixture[str]) -> None:
    with serve(lambda path, body, number: stream(path, delay=0.02), models=MODELS) as server:
        code, found, errors = call(capfd, server.url, "--concurrency", "2", "--num-requests", "6", "--max-tokens", "9")
    results = found["results"]
    assert (code, errors) == (0, "")
    assert len(server.requests) == 6 + 2  # and the warm-up
    path, body, _ = server.requests[-1]
    assert (path, body["model"], body["max_tokens"], body["stream"]) == ("/v1/completions", "a/model", 9, True)
    assert len({body["prompt"] for _, body, _ in server.requests}) == 8
    assert (results["requests"], results["answered"], results["errors"]) == (6, 6, [])
    assert (results["output_tokens"], results["prompt_tokens"], results["tokens_counted_by"]) == (42, 30, "usage")
    # Each chunk comes 20 ms after the one before, and holds 1, 3, 2 and 1 tokens.
    assert 0.02 <= results["time_to_first_token_s"]["p50"] < 0.2
    assert results["piece_gap_s"]["count"] == 18
    assert 0.019 <= results["piece_gap_s"]["p50"] < 0.1
    assert results["inter_token_s"]["count"] == 36
    assert results["inter_token_s"]["p50"] < results["piece_gap_s"]["p50"]
    assert results["end_to_end_s"]["p99"] >= results["end_to_end_s"]["p50"] >= 0.1
    assert results["requests_per_second"] == pytest.approx(6 / results["seconds"])
    assert results["speculation"]["draft_acceptance_rate"] == pytest.approx(4 / 6)
    assert results["speculation"]["accepted_by_position"] == [12, 6, 6]


def test_two_clients_are_never_more_than_two(capfd: pytest.CaptureFixture[str]) -> None:
    running, most = 0, 0

    def answer(path: str, body: dict[str, Any], number: int) -> Script:
        return stream(path, delay=0.01)

    with serve(answer, models=MODELS) as server:
        _, found, _ = call(capfd, server.url, "--concurrency", "2", "--num-requests", "8", "--output", "run")
    lines = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    changes = sorted([(s["start"], 1) for s in lines] + [(s["start"] + s["seconds"], -1) for s in lines])
    for _, change in changes:
        running += change
        most = max(most, running)
    assert most == 2
    assert found["results"]["answered"] == 8


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LAYERSKIP_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_poisson_arrivals_do_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    """Requests arrive while others still run: many more at once than one after the other would be."""
    with serve(lambda path, body, number: stream(path, delay=0.1), models=MODELS) as server:
        argv = ["--request-rate", "40", "--seconds", "1", "--warm-up", "0", "--output-dir", "run"]
        code, found, _ = call(capfd, server.url, *argv)
    lines = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert code == 0
    assert 20 <= len(lines) <= 65  # 40 expected; the seed fixes how many
    assert all(0 <= line["start"] < 1.5 for line in lines)
    assert found["results"]["seconds"] < 0.5 * len(lines) * 0.5
    assert sum(line["start"] < lines[0]["start"] + lines[0]["seconds"] for line in lines) > 5


def test_without_counts_pieces_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    with serve(lambda path, body, number: stream(path, told=False), models=MODELS) as server:
        code, found, _ = call(capfd, server.url, "--num-requests", "2")
        assert main(["bench-serve", server.url, "--num-requests", "2"]) == 0
    assert code == 0
    assert (found["results"]["output_tokens"], found["results"]["tokens_counted_by"]) == (8, "pieces")
    assert found["results"]["speculation"] is None
    assert found["results"]["inter_token_s"]["count"] == 0
    assert "doesn't tell how many tokens" in capfd.readouterr().out


def test_a_data_set_of_messages(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = ["--dataset", "chat_format", "--data-path", "chat.jsonl", "--warm-up", "0", "--num-requests", "5"]
    with serve(lambda path, body, number: stream(path), models=MODELS) as server:
        code, found, _ = call(capfd, server.url, *data, "--model", "other", "--seed", "3")
    assert code == 0
    assert [body["messages"] for _, body, _ in server.requests] == [*rows, *rows[:2]]
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert [body["seed"] for _, body, _ in server.requests] == [3, 4, 5, 6, 7]
    assert server.requests[0][1]["model"] == "other"
    assert found["results"]["output_tokens"] == 35


def test_failures_are_counted_by_kind(capfd: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any], number: int) -> Script:
        error = {"error": {"message": "the engine has failed", "type": "server_error"}}
        whole = stream(path)
        return [
            whole,
            Script(status=500, content=error),
            Script(status=503, headers={"Retry-After": "0.3"}, content={"error": {"message": "the queue is full"}}),
            Script(chunks=whole.chunks[:2], cut=True),
            Script(chunks=whole.chunks[:2]),  # ended in good order, but too early
            Script(chunks=(*whole.chunks[:1], error)),
            Script(chunks=("data: {\n\n",)),
            Script(content={"choices": []}),
            whole,
        ][number]

    with serve(answer, models=MODELS) as server:
        code, found, _ = call(capfd, server.url, "--warm-up", "0", "--num-requests", "9", "--output-dir", "run")
        assert main(["report", "run"]) == 0
    results = found["results"]
    assert code == 1
    assert (results["requests"], results["answered"], results["output_tokens"]) == (9, 2, 14)
    assert {error["kind"]: error["count"] for error in results["errors"]} == {
        "HTTP 500": 1,
        "HTTP 503": 1,
        "connection lost": 2,
        "error in the stream": 1,
        "unreadable stream": 1,
        "not a stream": 1,
    }
    examples = {error["kind"]: error["example"] for error in results["errors"]}
    assert (examples["HTTP 500"], examples["HTTP 503"]) == ("the engine has failed", "the queue is full")
    lines = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert lines[3]["start"] - lines[2]["start"] >= 0.3  # the client waited as long as it was asked to
    assert lines[3]["text"] == "Once upon a time"
    page = Path("run/report.html").read_text()
    assert "the queue is full" in page
    assert "Acceptance by position" in page


def test_silence_is_a_timeout(capfd: pytest.CaptureFixture[str]) -> None:
    with serve(lambda path, body, number: stream(path, delay=1.0), models=MODELS) as server:
        code, found, _ = call(capfd, server.url, "--warm-up", "0", "--num-requests", "1", "--timeout", "0.2")
    assert code == 1
    assert [error["kind"] for error in found["results"]["errors"]] == ["timeout"]


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    code, found, errors = call(capfd, *argv)
    assert (code, found) == (2, None)
    assert errors.count("\n") == 1, errors
    return errors


def test_what_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    assert "doesn't answer" in refused(capfd, "http://127.0.0.1:9")
    assert "url must be" in refused(capfd, "somewhere")
    assert "one of the two" in refused(capfd, "http://127.0.0.1:9", "--concurrency", "2", "--request-rate", "1")
    assert "--data-path belongs to a data set" in refused(capfd, "http://127.0.0.1:9", "--data-path", "x.jsonl")
    assert "--prompt-words" in refused(capfd, "http://127.0.0.1:9", "--dataset", "gsm8k", "--prompt-words", "3")
    assert "prompt_words must be" in refused(capfd, "http://127.0.0.1:9", "--prompt-words", "0")
    Path("key").write_text("two keys\n")
    assert "must hold one key" in refused(capfd, "http://127.0.0.1:9", "--api-key-file", "key")
    assert "No such file" in refused(capfd, "http://127.0.0.1:9", "--api-key-file", "missing")
    with serve(lambda path, body, number: stream(path), models=Script(content={"hello": 1})) as server:
        assert "isn't a server of OpenAI's protocol" in refused(capfd, server.url)
    no_list = Script(status=404, content={"detail": "Not Found"})
    with serve(lambda path, body, number: Script(status=404, content={}), models=no_list) as server:
        assert "isn't a server of OpenAI's protocol" in refused(capfd, server.url, "--model", "m")
    wrong = Script(status=404, content={"error": {"message": "model 'm' does not exist"}})
    with serve(lambda path, body, number: wrong, models=MODELS) as server:
        assert "model 'm' does not exist" in refused(capfd, server.url, "--model", "m")


def test_a_server_without_a_list_of_models(capfd: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any], number: int) -> Script:
        return stream(path) if "model" in body else Script(status=400, content={"error": {"message": "no model"}})

    with serve(answer, models=Script(status=404, content={"error": "no such path"})) as server:
        assert call(capfd, server.url, "--model", "m", "--num-requests", "2")[0] == 0


def test_keys(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Script(status=401, content={"error": {"message": "a key is needed"}})
    with serve(lambda path, body, number: stream(path), models=locked) as server:
        assert "refuses the key (HTTP 401: a key is needed)" in refused(capfd, server.url)
    Path("key").write_text("from-file\n")
    monkeypatch.setenv("OPENAI_API_KEY", "from-openai")
    with serve(lambda path, body, number: stream(path), models=MODELS) as server:
        call(capfd, server.url, "--num-requests", "1", "--warm-up", "0")
        monkeypatch.setenv("LAYERSKIP_API_KEY", "from-layerskip")
        call(capfd, server.url, "--num-requests", "1", "--warm-up", "0")
        argv = ["--num-requests", "1", "--warm-up", "0", "--api-key-file", "key", "--output-dir", "run"]
        call(capfd, server.url, *argv)
    sent = [headers["authorization"] for _, _, headers in server.requests]
    assert sent == ["Bearer from-openai", "Bearer from-layerskip", "Bearer from-file"]
    assert all("from-file" not in file.read_text() for file in Path("run").iterdir())


def start(server: Served, *argv: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "layerskip", "bench-serve", server.url, *argv]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(end: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--concurrency", "3", "--num-requests", "40", "--output-dir", "run"]
    samples = Path("run/samples.jsonl")
    with serve(lambda path, body, number: stream(path, delay=0.02), models=MODELS) as server:
        process = start(server, *argv)
        while process.poll() is None and (not samples.exists() or samples.read_bytes().count(b"\n") < 10):
            time.sleep(0.01)
        process.send_signal(end)
        out, _ = process.communicate(timeout=30)
        kept = samples.read_text().splitlines()
        assert 10 <= len(kept) < 40
        if end == signal.SIGINT:
            assert process.returncode == 130
            assert "the same command goes on in run" in out
        assert main(["bench-serve", server.url, "--concurrency", "4", *argv[2:]]) == 2  # another load
        code, found, _ = call(capfd, server.url, *argv)
    lines = samples.read_text().splitlines()
    assert code == 0
    assert lines[: len(kept)] == kept
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(40))
    assert {json.loads(line)["attempt"] for line in lines} == {1, 2}
    assert found["results"]["answered"] == 40
    assert Path("run/report.html").exists()


def test_ctrl_c_without_a_folder_shows_what_there_is() -> None:
    with serve(lambda path, body, number: stream(path, delay=0.01), models=MODELS) as server:
        process = start(server, "--seconds", "60", "--json")
        while len(server.requests) < 12 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    found = json.loads(out)
    assert (process.returncode, found["interrupted"], errors) == (130, True, "")
    assert found["results"]["answered"] >= 8


def test_a_finished_run_sends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--num-requests", "3", "--output-dir", "run"]
    with serve(lambda path, body, number: stream(path), models=MODELS) as server:
        call(capfd, server.url, *argv)
        sent = len(server.requests)
        code, found, _ = call(capfd, server.url, *argv)
        assert main(["report", "run"]) == 0
    assert (code, found["results"]["answered"], len(server.requests)) == (0, 3, sent)


def test_the_command_of_a_report_repeats_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--num-requests", "3", "--output-dir", "run", "--seed", "4", "--extra-body", '{"top_k": 2}', "--ignore-eos"]
    with serve(lambda path, body, number: stream(path), models=MODELS) as server:
        call(capfd, server.url, *argv)
        sent = len(server.requests)
        words = shlex.split(reproduction(json.loads(Path("run/results.json").read_text())))
        assert words[:2] == ["layerskip", "bench-serve"]
        assert main([*words[1:], "--output-dir", "run"]) == 0  # the same configuration: nothing is left to send
    assert len(server.requests) == sent


def test_runs_are_compared(capfd: pytest.CaptureFixture[str]) -> None:
    with serve(lambda path, body, number: stream(path, delay=0.005), models=MODELS) as server:
        for name in ("one", "two"):
            argv = ["--concurrency", "1" if name == "one" else "2", "--num-requests", "4", "--output-dir", name]
            assert call(capfd, server.url, *argv)[0] == 0
    assert main(["report", "one", "two", "--output", "both.html"]) == 0
    page = Path("both.html").read_text()
    assert "First token, p95" in page
    assert "concurrency" in page
