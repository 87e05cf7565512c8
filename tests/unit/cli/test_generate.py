"""`layerskip generate` where no terminal is: prompts from everywhere, plain text, JSON."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.stats import GenerationStats

PROMPT = "def add(a, b):"
SHORT = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def expected() -> str:
    return layerskip.load("demo").generate([PROMPT], max_new_tokens=12)[0].text


def test_text_alone_goes_to_standard_output(cli: Callable, expected: str) -> None:
    outcome = cli("generate", "--prompt", PROMPT, *SHORT)
    assert (outcome.code, outcome.out, outcome.err) == (0, expected + "\n", "")


@pytest.mark.parametrize("content", [PROMPT, PROMPT + "\n", PROMPT + "\r\n"])
def test_prompts_from_files_and_standard_input(content: str, cli: Callable, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "a prompt.txt"
    file.write_bytes(content.encode())
    assert cli("generate", "--prompt-file", str(file), *SHORT).out == expected + "\n"
    assert cli("generate", *SHORT, stdin=content.encode()).out == expected + "\n"


def test_only_one_line_break_is_dropped(cli: Callable) -> None:
    assert json.loads(cli("generate", "--json", *SHORT, stdin=b"a\n\n").out)["prompt"] == "a\n"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_prompts_that_are_no_text(content: bytes, cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(content)
    for outcome in (cli("generate", stdin=content), cli("generate", "--prompt-file", str(file))):
        assert outcome.code == 2
        assert "empty" in outcome.err or "not UTF-8" in outcome.err
        assert outcome.err.count("\n") == 1


def test_command_lines_that_are_no_text(cli: Callable) -> None:
    assert "not UTF-8" in cli("generate", "--prompt", "a\udcff").err


def test_json_is_one_object_with_everything(cli: Callable, expected: str) -> None:
    outcome = cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--exit_layer", "3", "--seed", "5")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    record = json.loads(outcome.out)
    assert set(record) == {
        *("prompt", "text", "token_ids", "finish_reason", "stop_reason", "seed", "stats", "model", "config")
    }
    assert record["text"] == expected
    assert record["prompt"] == PROMPT
    assert len(record["token_ids"]) == record["stats"]["tokens"] == 12
    assert (record["finish_reason"], record["stop_reason"], record["seed"]) == ("length", None, 5)
    assert set(record["stats"]) == {each.name for each in fields(GenerationStats)}
    assert set(record["config"]) == {each.name for each in fields(GenerationConfig)}
    assert sum(record["stats"]["accepted_by_position"]) == record["stats"]["accepted"]


def test_json_resolves_the_config(cli: Callable) -> None:
    config = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--temperature", "0.5").out)["config"]
    assert (config["generation_strategy"], config["exit_layer"]) == ("adaptive", None)
    assert config["do_sample"] is True
    assert config["eos_token_ids"] == [1]
    assert isinstance(config["seed"], int)
    fixed = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--num-speculations", "3").out)["config"]
    assert (fixed["generation_strategy"], fixed["exit_layer"], fixed["num_speculations"]) == ("self_speculative", 4, 3)
    plain = ("--generation_strategy", "autoregressive")
    assert json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", *plain).out)["config"]["exit_layer"] == 16


def test_json_says_which_text_stopped_it(cli: Callable, expected: str) -> None:
    stop = expected.strip()[2:5]
    record = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--stop", "zzz", "--stop", stop).out)
    assert (record["finish_reason"], record["stop_reason"]) == ("stop", stop)
    assert record["text"] == expected[: expected.index(stop)]


def test_a_seed_repeats_the_text(cli: Callable) -> None:
    flags = ("generate", "--prompt", PROMPT, *SHORT, "--sample", "--json")
    first = json.loads(cli(*flags).out)
    again = json.loads(cli(*flags, "--seed", str(first["seed"])).out)
    assert again["token_ids"] == first["token_ids"]


def test_comparison_in_json(cli: Callable) -> None:
    record = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--compare", "--sample").out)
    assert record["same_text"] is True
    assert record["speedup"] > 0
    assert record["autoregressive"]["layer_calls"] == 12 * 16
    rejection = ("--sample", "--acceptance", "rejection")
    record = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--compare", *rejection).out)
    assert record["same_text"] is None


def test_comparison_of_plain_text_goes_to_standard_error(cli: Callable, expected: str) -> None:
    outcome = cli("generate", "--prompt", PROMPT, *SHORT, "--compare")
    assert (outcome.code, outcome.out) == (0, expected + "\n")
    assert "same text" in outcome.err
    assert "\x1b" not in outcome.err


def test_explain(cli: Callable) -> None:
    record = json.loads(cli("generate", "--prompt", PROMPT, *SHORT, "--json", "--explain").out)["explanation"]
    assert sum(record["rounds"].values()) > 0
    assert [outlook["exit_layer"] for outlook in record["exits"]] == [1, 2, 4, 6, 8]
    assert record["reasons"]
    told = cli("generate", "--prompt", PROMPT, *SHORT, "--explain").err
    assert "rounds had" in told
    assert "exit 4: right" in told


def test_explain_needs_the_adaptive_strategy(cli: Callable) -> None:
    result = cli("generate", "--prompt", PROMPT, *SHORT, "--explain", "--exit-layer", "4")
    assert result.code == 2
    assert "leave out" in result.err
