"""Prompts that leave no room for an answer are left out, counted and told; the others are measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LONG = "x = 1\n" * 2000


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Four prompts, of which the second and the fourth are too long for the embedded model."""
    file = tmp_path / "prompts.jsonl"
    texts = ["def add(a, b):", LONG, "class Stack:", LONG]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def custom(prompts: Path) -> list[str]:
    return ["--dataset", "custom_jsonl", "--data-path", str(prompts), "--max-new-tokens", "4"]


COMMANDS: dict[str, list[str]] = {
    "benchmark": ["--strategies", "autoregressive,self_speculative", "--exit-layer", "4", "--num-speculations", "2"],
    "sweep": ["--exit-layer-first", "4", "--exit-layer-last", "4", "--num-speculations-last", "2"],
    "verify": ["--exit-layers", "4", "--num-speculations", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_in_a_folder(cli: Callable[..., Any], prompts: Path, tmp_path: Path, command: str) -> None:
    arguments = [command, *custom(prompts), *COMMANDS[command], "--output-dir", str(tmp_path / "run")]
    for _ in range(2):  # the second goes on from what the first has kept
        outcome = cli(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        assert "2 of 4 prompts were left out; the first: prompt 1 has" in outcome.err
        left_out = json.loads(outcome.out)["results"]["left_out"]
        assert [each["index"] for each in left_out] == [1, 3]
        assert "context of 1024" in left_out[0]["reason"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["left_out"] == left_out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 prompts leave no room for an answer" in page
    assert "context of 1024" in page


def test_verify_without_a_folder(cli: Callable[..., Any], prompts: Path) -> None:
    arguments = ["verify", "--prompts", str(prompts), "--max-new-tokens", "4", *COMMANDS["verify"]]
    outcome = cli(*arguments, "--json")
    assert outcome.code == 0
    assert "2 of 4 prompts were left out" in outcome.err
    record = json.loads(outcome.out)
    assert (record["num_prompts"], [each["index"] for each in record["left_out"]]) == (2, [1, 3])


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_could_be_measured(cli: Callable[..., Any], tmp_path: Path, command: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": LONG}) + "\n")
    outcome = cli(command, *custom(file), *COMMANDS[command], "--output-dir", str(tmp_path / "run"))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "none of the 1 prompts can be used; the first: prompt 0 has" in outcome.err


def test_lines_with_odd_characters(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Line separators within texts, a byte order mark, CRLF, blank lines, no end of line at the end."""
    texts = ["def f(a):\u2028    return\u0085", "class\u000bStack:\u000c", "x = '\u2029'"]
    lines = "\r\n\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    for arguments in (
        ["verify", "--prompts", str(file), "--max-new-tokens", "2", *COMMANDS["verify"], "--json"],
        ["batch", "--input", str(file), "--output-file", str(tmp_path / "out.jsonl"), "--max-new-tokens", "2"],
        ["inspect", "--text", str(file), "--field", "prompt", "--json"],
        ["benchmark", *custom(file), "--strategies", "autoregressive", "--output-dir", str(tmp_path / "run")],
    ):
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
    file.write_bytes(file.read_bytes() + b"\n\n{broken\n")
    outcome = cli("verify", "--prompts", str(file))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{file}, line 7 is not JSON" in outcome.err


def test_json_nested_without_end(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    for arguments in (
        ["verify", "--prompts", str(file)],
        ["batch", "--input", str(file), "--output-file", str(tmp_path / "out.jsonl")],
        ["benchmark", *custom(file), "--output-dir", str(tmp_path / "run")],
    ):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "nested too deep" in outcome.err
