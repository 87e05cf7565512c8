"""`layerskip verify` and `layerskip inspect`: what they print, their exit codes, their errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip.cli.main import main
from layerskip.decoding import self_speculative
from layerskip.decoding.batch import Batch, Round
from layerskip.decoding.drafting import Draft
from layerskip.decoding.self_speculative import Verification

SHORT = ["--max-new-tokens", "6", "--exit-layers", "2,4", "--num-speculations", "1,4"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"text": "def add(a, b):"}, {"text": "import os\n"}, {"text": "class A:"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_verify_prints_every_setting_as_json(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", "--prompts", str(prompts), "--field", "text", "--limit", "2", *SHORT, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["errors"] == 0
    assert report["num_prompts"] == 2
    keys = [(s["exit_layer"], s["num_speculations"], s["mode"]) for s in report["settings"]]
    assert keys == [(e, k, mode) for mode in ("greedy", "coupled") for e in (2, 4) for k in (1, 4)]
    assert all((s["equal"], s["near_ties"], s["errors"]) == (2, 0, 0) for s in report["settings"])


def test_verify_fails_with_exit_code_1_when_something_is_lost(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = self_speculative.verify

    def wrong(batch: Batch, draft: Draft, exits: Any) -> Verification:
        rounds = honest(batch, draft, exits).rounds
        wrong = [Round(drafts=r.drafts, num_accepted=0, token=(r.token + 1) % 256) for r in rounds]
        return Verification(rounds=wrong)

    monkeypatch.setattr(self_speculative, "verify", wrong)
    arguments = ["--prompts", str(prompts), "--field", "text", "--mode", "greedy", *SHORT]
    assert main(["verify", *arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] > 0
    assert main(["verify", *arguments]) == 1
    assert "errors" in capsys.readouterr().out


def test_verify_tests_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--top-k", "5", "--distribution", "--draws", "2000", "--json"]
    assert main(["verify", "--prompt", "def f(x):", "--max-new-tokens", "4", "--exit-layers", "4", *options]) == 0
    tests = json.loads(capsys.readouterr().out)["distribution"]
    assert [t["acceptance"] for t in tests] == ["rejection", "rejection, block"]
    assert all(t["passed"] and t["draws"] == 2000 for t in tests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit-layers", "0"], "exit_layers must be positive whole numbers"),
        (["--exit-layers", "17"], "exit_layer 17 is outside 1..16"),
        (["--num-speculations", "1,x"], "num_speculations must be positive whole numbers"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--temperature", "nan"], "temperature"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--prompt", "a", "--prompts", "b.txt"], "not both"),
        (["--limit", "0", "--prompts", __file__], "limit must be at least 1"),
        (["--batch-size", "0"], "batch size"),
    ],
)
def test_verify_reports_bad_input_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("layerskip: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_inspect_prints_exits_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("def add(a, b):\n    return a + b\n" * 3)
    assert main(["inspect", "--model", "demo", "--text", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [e["exit_layer"] for e in report["exits"]] == list(range(1, 17))
    assert report["exits"][-1]["agreement"] == 1.0
    assert report["exits"][0]["loss"] > report["exits"][-1]["loss"]
    assert report["model"]["parameters"] == 6_691_008
    assert report["model"]["num_layers"] == 16


def test_inspect_reads_no_more_than_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "def add(a, b):"}\n' * 9)  # 8 tokens each
    for limit, predicted in (("2", 1), ("7", 6), ("10", 8), ("99", 63)):
        assert main(["inspect", "--text", str(file), "--max-tokens", limit, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_tokens"] == predicted


def test_inspect_prints_a_table_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--prompt", "def add(a, b):\n    return a + b\n"]) == 0
    out = capsys.readouterr().out
    assert "exit layer" in out
    assert "made for early exit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no folder 'nowhere'"),
        (["--text", "nowhere.txt"], "can't be read"),
        (["--prompt", "a", "--text", "b.txt"], "not both"),
        (["--prompt", ""], "empty"),
        (["--max-tokens", "1"], "max_tokens must be at least 2, got 1"),
    ],
)
def test_inspect_reports_bad_input_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
