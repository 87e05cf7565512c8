"""`layerskip inspect --memory`: what it prints, and its errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip import machine
from layerskip.checkpoint.safetensors import SafetensorsFiles


def test_memory_is_shown_without_reading_a_tensor(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SafetensorsFiles, "get", lambda *_: pytest.fail("a tensor was read"))
    outcome = cli("inspect", "--memory", "--model", "demo")
    assert (outcome.code, outcome.err) == (0, "")
    for text in ("layers", "embedding", "peak of loading", "the whole context"):
        assert text in outcome.out, text


def test_memory_as_json_for_a_batch(cli: Callable) -> None:
    memory = json.loads(cli("inspect", "--memory", "--json", "--batch-size", "3").out)
    assert memory["batch_size"] == 3
    assert memory["batch_cache"] == 3 * memory["cache"]
    assert memory["weights"] == sum(part["kept"] for part in memory["parts"])
    assert memory["needed"] >= memory["weights"] + memory["batch_cache"] + memory["working"]
    assert memory["ranks"][0]["weights"] == memory["weights"]


def test_a_model_that_does_not_fit_is_shown_and_says_so(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    outcome = cli("inspect", "--memory", "--model", "demo")
    assert outcome.code == 0
    assert "The model doesn't fit: 0.0 MiB are free. Use fewer bits" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "--prompt", "text"], "--memory reads no text; give it or --prompt, not both"),
        (["--memory", "--batch-size", "0"], "batch_size must be"),
        (["--batch-size", "2"], "--batch-size is for --memory"),
        (["--memory", "--quantize", "fp8"], "needs a CUDA GPU"),
    ],
)
def test_errors_of_memory(cli: Callable, arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = cli("inspect", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
