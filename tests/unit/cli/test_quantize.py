"""`layerskip quantize`: what it prints and writes, and its errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip import load


def test_a_comparison_as_json_and_a_checkpoint_that_loads(cli: Callable, tmp_path: Path) -> None:
    output = tmp_path / "saved"
    outcome = cli(
        "quantize", "--model", "demo", "--quantize", "int8", "--output", str(output), "--max-tokens", "200", "--json"
    )
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert report["bytes_after"] < report["bytes_before"]
    last = report["exits"][-1]
    assert last["before"]["loss"] == pytest.approx(last["after"]["loss"], abs=0.05)
    assert last["before"]["loss"] != last["after"]["loss"]
    assert last["after"]["agreement"] == 1
    assert report["drafts_before"]["drafted"] > 0
    assert 0 < report["drafts_after"]["accepted"] <= 1
    at_load = load("demo", device="cpu", quantize="int8", exit_adapters=None).generate("def add(", max_new_tokens=12)[0]
    assert load(str(output), device="cpu").generate("def add(", max_new_tokens=12)[0].text == at_load.text


def test_a_table_of_all_exits(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    outcome = cli(
        "quantize", "--quantize", "int4", "--output", str(tmp_path / "saved"), "--text", str(tmp_path / "text.txt")
    )
    assert outcome.code == 0
    for text in ("int4, over", "in fewer bits", "accepted of 4 drafts at exit", "MB before"):
        assert text in outcome.out, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "quantize must be int8 or int4 to be saved, got None"),
        (["--quantize", "fp8"], "quantize must be int8 or int4 to be saved, got 'fp8'"),
        (["--quantize", "int8", "--max-tokens", "1"], "max_tokens must be at least 2"),
        (["--quantize", "int8", "--text", "nowhere"], "nowhere"),
        (["--quantize", "int8", "--dtype", "float16", "--kernels", "native"], "kernels 'native' can't run this model"),
    ],
)
def test_errors_come_before_any_work(cli: Callable, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = cli("quantize", *arguments, "--output", str(tmp_path / "saved"))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = cli("quantize", "--quantize", "int8", "--output", str(tmp_path))
    assert outcome.code == 2
    assert "isn't empty" in outcome.err
