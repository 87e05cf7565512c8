"""`layerskip demo` where no terminal is."""

import json
from collections.abc import Callable

import pytest

from layerskip.cli.demo import PROMPTS, Measurement

SHORT = ("demo", "--max-new-tokens", "16")


def test_json(cli: Callable) -> None:
    outcome = cli(*SHORT, "--num-speculations", "3", "--json")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    record = json.loads(outcome.out)
    assert record["same_text"] is True
    assert record["repetitions"] >= 3
    assert record["speedup"] > 0
    assert [each["prompt"] for each in record["prompts"]] == list(PROMPTS)
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
