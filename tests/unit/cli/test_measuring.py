"""`layerskip benchmark` and `layerskip sweep`: outputs, files, and bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SPREAD = {
    "type": "object",
    "properties": {"median": {"type": ["number", "null"]}, "p95": {"type": ["number", "null"]}},
    "required": ["median", "p95"],
}
FRAME: dict[str, Any] = {
    "type": "object",
    "required": ["schema", "kind", "configuration", "machine", "results"],
    "properties": {
        "schema": {"const": 1},
        "configuration": {"type": "object", "required": ["model", "dataset", "num_samples"]},
        "machine": {"type": "object", "required": ["date", "commit", "cpu", "cores", "threads", "gpu", "versions"]},
    },
}
STRATEGY = {
    "type": "object",
    "required": ["name", "options", "metrics", "speedup", "speedup_low", "speedup_high"],
    "properties": {
        "name": {"type": "string"},
        "samples": {"type": "integer", "minimum": 1},
        "empty_texts": {"type": "integer", "minimum": 0},
        "tokens": {"type": "integer", "minimum": 1},
        "tokens_per_second": {"type": "number", "exclusiveMinimum": 0},
        "time_to_first_token_s": SPREAD,
        "time_per_token_s": SPREAD,
        "acceptance_rate": {"type": "number", "minimum": 0, "maximum": 1},
        "drafted_by_position": {"type": "array", "items": {"type": "integer"}},
        "accepted_by_position": {"type": "array", "items": {"type": "integer"}},
        "peak_memory_bytes": {"type": "integer", "exclusiveMinimum": 0},
        "metrics": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
OPTIONAL_NUMBER = {"type": ["number", "null"], "exclusiveMinimum": 0}
SETTING = {
    "type": "object",
    "required": ["exit_layer", "num_speculations", "acceptance_rate"],
    "additionalProperties": False,
    "properties": {
        "exit_layer": {"type": "integer", "minimum": 1},
        "num_speculations": {"type": "integer", "minimum": 1},
        "acceptance_rate": {"type": "number", "minimum": 0, "maximum": 1},
        "total_time": OPTIONAL_NUMBER,
        "time_per_token": OPTIONAL_NUMBER,
        "tokens_per_second": OPTIONAL_NUMBER,
        "predicted_tokens_per_second": OPTIONAL_NUMBER,
    },
}
BENCHMARK = {"type": "object", "required": ["strategies"], "properties": {"strategies": {"items": STRATEGY}}}
SWEEP = {
    "type": "object",
    "required": ["method", "autoregressive_tokens_per_second", "grid", "best", "prediction_error", "seconds"],
    "properties": {"method": {"enum": ["one_pass", "exhaustive"]}, "grid": {"minItems": 1, "items": SETTING}},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [{"prompt": f"def f{i}(x):\n    return", "reference": " x"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data.jsonl"


@pytest.fixture
def flags(tmp_path: Path, data: Path) -> list[str]:
    named = ["--dataset", "custom_jsonl", "--data-path", str(data), "--max-new-tokens", "12"]
    return [*named, "--output-dir", str(tmp_path / "out")]


def test_benchmark(cli: Callable[..., Any], flags: list[str], tmp_path: Path) -> None:
    names = ("autoregressive", "self_speculative", "adaptive")
    shown = cli("benchmark", *flags, "--num-samples", "3")
    assert shown.code == 0, shown.err
    assert all(name in shown.out for name in (*names, "rouge1", "tokens/s"))
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    jsonschema.validate(content, {**FRAME, "properties": {**FRAME["properties"], "results": BENCHMARK}})
    assert [row["name"] for row in content["results"]["strategies"]] == list(names)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert sorted({sample["key"] for sample in samples}) == sorted(f"{i}/{name}" for i in range(3) for name in names)
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    again = cli("benchmark", *flags, "--num-samples", "3", "--json")
    assert json.loads(again.out)["results"] == content["results"]  # nothing was run again
    other = cli("benchmark", *flags, "--num-samples", "2")
    assert other.code == 2
    assert "num_samples 3, not 2" in other.err


def test_sweep(cli: Callable[..., Any], flags: list[str], tmp_path: Path, demo_config: dict[str, Any]) -> None:
    ranges = ["--exit-layer-first", "2", "--exit-layer-last", "6", "--exit-layer-step", "2",
              "--num-speculations-last", "3", "--num-speculations-step", "2"]  # fmt: skip
    found = cli("sweep", *flags, *ranges, "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert content.pop("saved") is None
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    jsonschema.validate(content, {**FRAME, "properties": {**FRAME["properties"], "results": SWEEP}})
    pairs = [(row["exit_layer"], row["num_speculations"]) for row in content["results"]["grid"]]
    assert pairs == [(exit_layer, length) for exit_layer in (2, 4, 6) for length in (1, 3)]
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "sweep.csv").read_text().splitlines()[0] == (
        "exit_layer,num_speculations,acceptance_rate,total_time,time_per_token,tokens_per_second,"
        "predicted_tokens_per_second"
    )
    shown = cli("sweep", *flags, *ranges)
    assert "the best of 6 settings" in shown.out
    assert "autoregressive decoding" in shown.out


def test_the_best_setting_is_saved(
    cli: Callable[..., Any], flags: list[str], tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path / "model")
    found = cli("sweep", "--model", str(model), *flags, "--num-speculations-last", "2", "--save", "--json")
    assert found.code == 0, found.err
    best = json.loads(found.out)["results"]["best"]
    saved = json.loads((model / "layerskip.json").read_text())
    assert (saved["exit_layer"], saved["num_speculations"]) == (best["exit_layer"], best["num_speculations"])
    strategy = ("--generation-strategy", "self_speculative", "--max-new-tokens", "4", "--json")
    used = cli("generate", "--model", str(model), "--prompt", "x = 1", *strategy)
    assert json.loads(used.out)["config"]["exit_layer"] == best["exit_layer"]
    assert json.loads(used.out)["config"]["num_speculations"] == best["num_speculations"]


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("benchmark", ["--strategies", "fast"], "'fast' is not known"),
        ("benchmark", ["--generation-strategy", "ngram"], "--strategies says how"),
        ("benchmark", ["--execute-code"], "--execute-code is for"),
        ("benchmark", ["--dataset", "novels"], "cnn_dm_summarization"),
        ("benchmark", ["--num-samples", "0"], "num_samples"),
        ("benchmark", ["--template", "{title}"], "title"),
        ("sweep", ["--exit-layer-first", "9", "--exit-layer-last", "3"], "grid is empty"),
        ("sweep", ["--exit-layer-last", "16"], "use 1 to 15"),
        ("sweep", ["--num-speculations-step", "0"], "num_speculations_step"),
        ("sweep", ["--save"], "copy it first"),
    ],
)
def test_bad_input(cli: Callable[..., Any], flags: list[str], command: str, more: list[str], message: str) -> None:
    found = cli(command, *flags, *more)
    assert found.code == 2
    assert message in found.err
    assert len(found.err.splitlines()) == 1


def test_an_empty_data_set(cli: Callable[..., Any], flags: list[str], data: Path) -> None:
    data.write_text("")
    found = cli("benchmark", *flags)
    assert found.code == 2
    assert "empty" in found.err
