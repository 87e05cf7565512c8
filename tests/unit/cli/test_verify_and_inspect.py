"""`layerskip verify` and `layerskip inspect`: what they print, their exit codes, their errors."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerskip.cli.main import main
from layerskip.decoding import engine
from layerskip.decoding.batch import Batch
from layerskip.decoding.policy import Plan, RoundResult
from layerskip.evaluation.verify import distribution
from layerskip.language_model import LanguageModel

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


@pytest.fixture
def wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make verification write other tokens than the model's."""
    honest = engine.run_rounds

    def wrong(batch: Batch, plan: Plan, **options: Any) -> list[RoundResult]:
        results = honest(batch, plan, **options)
        if plan.source == "none":
            return results
        last = results[-1]
        return [*results[:-1], replace(last, tokens=[(token + 1) % 256 for token in last.tokens])]

    monkeypatch.setattr(engine, "run_rounds", wrong)


@pytest.mark.usefixtures("wrong_tokens")
def test_verify_fails_with_exit_code_1_when_something_is_lost(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", str(prompts), "--field", "text", "--mode", "greedy", *SHORT]
    assert main(["verify", *arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] > 0
    assert main(["verify", *arguments]) == 1
    assert "errors" in capsys.readouterr().out


@pytest.mark.usefixtures("wrong_tokens")
def test_verify_lists_near_ties(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", str(prompts), "--field", "text", "--mode", "greedy", *SHORT, "--tolerance", "1000"]
    assert main(["verify", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (first, *_), rest = report["settings"][0]["divergences"], report["settings"][1:]
    assert set(first) == {"prompt", "position", "expected", "actual", "gap", "near_tie"}
    assert all(setting["near_ties"] == 3 for setting in (report["settings"][0], *rest))
    assert main(["verify", *arguments]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.partition("the first token that differs")[2].splitlines() if "greedy" in line]
    assert len(rows) == 3 * 4
    assert all(str(first[name]) in rows[0] for name in ("prompt", "position", "expected", "actual"))


@pytest.mark.usefixtures("wrong_tokens")
def test_a_long_list_of_near_ties_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": f"x{i} ="} for i in range(45)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ["--prompts", str(tmp_path / "data.jsonl"), "--exit-layers", "1", "--max-new-tokens", "2"]
    assert main(["verify", *named, "--mode", "greedy", "--batch-size", "45", "--tolerance", "1000"]) == 0
    out = capsys.readouterr().out
    assert "5 more near-ties: --json has all" in out
    assert sum("greedy" in line for line in out.splitlines()) == 1 + 40


def test_verify_lists_nothing_where_nothing_differs(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--prompts", str(prompts), "--field", "text", *SHORT]) == 0
    assert "first token that differs" not in capsys.readouterr().out


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags that name a data set of five prompts, shuffled, and a folder for the results of four."""
    lines = [{"prompt": f"def f{i}(x):\n    return", "reference": " x"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ["--dataset", "custom_jsonl", "--data-path", str(tmp_path / "data.jsonl"), "--num-samples", "4"]
    return [*named, "--shuffle-seed", "1", "--output-dir", str(tmp_path / "out"), *SHORT]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Prompts of each call of `generate`."""
    honest, found = LanguageModel.generate, list[Any]()

    def counts(lm: LanguageModel, prompts: Any, *rest: Any) -> Any:
        found.append(prompts)
        return honest(lm, prompts, *rest)

    monkeypatch.setattr(LanguageModel, "generate", counts)
    return found


def test_verify_keeps_what_it_found_on_a_data_set(
    cli: Callable[..., Any], data: list[str], tmp_path: Path, calls: list[Any]
) -> None:
    found = cli("verify", *data, "--json")
    assert (found.code, found.err) == (0, "")
    content = json.loads(found.out)
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["kind"] == "verify"
    assert content["configuration"]["dataset"] == "custom_jsonl"
    results = content["results"]
    assert {name: results[name] for name in ("prompts", "differences", "near_ties", "errors", "divergences")} == {
        "prompts": 4, "differences": 0, "near_ties": 0, "errors": 0, "divergences": [],
    }  # fmt: skip
    assert results["tokens"] == sum(setting["tokens"] for setting in results["settings"]) > 0
    assert len(calls) == 4 * 2 * 5
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len({sample["key"] for sample in samples}) == len(samples) == 1 + 4 * 2 * 5
    assert len({sample["index"] for sample in samples[1:]}) == 4
    assert [sample["index"] for sample in samples[1:41:10]] != [0, 1, 2, 3]
    assert "Nothing lost" in (tmp_path / "out" / "report.html").read_text()
    again = cli("verify", *data)
    assert (again.code, len(calls)) == (0, 40)
    assert all(text in again.out for text in ("nothing lost", "Report: ", "report.html"))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results
    without = cli("verify", *[part for part in data if part not in ("--output-dir", str(tmp_path / "out"))], "--json")
    assert [{**setting, "divergences": []} for setting in results["settings"]] == json.loads(without.out)["settings"]
    other = cli("verify", *data, "--seed", "5")
    assert other.code == 2
    assert "seed 0, not 5" in other.err


@pytest.mark.usefixtures("wrong_tokens")
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_verify_goes_on_after_an_interruption(
    cli: Callable[..., Any],
    data: list[str],
    tmp_path: Path,
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    counted = LanguageModel.generate

    def stops(lm: LanguageModel, prompts: Any, *rest: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        return counted(lm, prompts, *rest)

    monkeypatch.setattr(LanguageModel, "generate", stops)
    assert cli("verify", *data).code == 130
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(LanguageModel, "generate", counted)
    found = cli("verify", *data, "--json")
    assert (found.code, len(calls)) == (1, 40)
    results = json.loads(found.out)["results"]
    assert results["errors"] == len(results["divergences"]) == results["differences"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{results['errors']} errors" in page
    first = results["divergences"][0]
    assert all(f">{first[name]}<" in page for name in ("position", "expected", "actual"))
    assert "def f" in first["before"]
    whole = cli("verify", *data[:-8], "--output-dir", str(tmp_path / "whole"), *SHORT, "--json")
    assert json.loads(whole.out)["results"] == results


def test_the_command_of_the_report_is_this_one(
    cli: Callable[..., Any], data: list[str], tmp_path: Path, calls: list[Any]
) -> None:
    from layerskip.evaluation.report.parts import reproduction

    for flags in (data, ["--prompt", "x = 1", "--output-dir", str(tmp_path / "out2"), *SHORT, "--tolerance", "0.5"]):
        content = json.loads(cli("verify", *flags, "--json").out)
        calls.clear()
        folder = flags[flags.index("--output-dir") + 1]
        program, *words = shlex.split(reproduction(content))
        again = cli(*words, "--output-dir", folder, "--json")
        assert (program, again.code, again.err, calls) == ("layerskip", 0, "", [])
        assert json.loads(again.out)["results"] == content["results"]


def test_distribution_tests_are_kept(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, tested = distribution.verify_distribution, list[bool]()

    def stops(*given: Any, block: bool, **options: Any) -> Any:
        if block:
            raise KeyboardInterrupt
        tested.append(block)
        return honest(*given, block=block, **options)

    def counts(*given: Any, block: bool, **options: Any) -> Any:
        tested.append(block)
        return honest(*given, block=block, **options)

    named = ["--prompt", "def f(x):", "--max-new-tokens", "4", "--exit-layers", "4", "--top-k", "5", "--distribution"]
    flags = [*named, "--draws", "1000", "--output-dir", str(tmp_path), "--json"]
    monkeypatch.setattr(distribution, "verify_distribution", stops)
    assert cli("verify", *flags).code == 130
    monkeypatch.setattr(distribution, "verify_distribution", counts)
    found = cli("verify", *flags)
    tests = json.loads(found.out)["results"]["distribution"]
    assert (found.code, tested) == (0, [False, True])
    assert [test["acceptance"] for test in tests] == ["rejection", "rejection, block"]
    assert json.loads(cli("verify", *flags).out)["results"]["distribution"] == tests
    assert tested == [False, True]


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
        (["--prompt", "a", "--prompts", "b.txt"], "either a prompt or a file of prompts, not both"),
        (["--prompt", "a", "--dataset", "gsm8k"], "either a prompt or a data set, not both"),
        (["--prompts", "b.txt", "--dataset", "gsm8k"], "either a file of prompts or a data set, not both"),
        (["--data-path", "x.jsonl"], "--data-path is for --dataset"),
        (["--prompt", "a", "--n-shot", "2"], "--n-shot is for --dataset"),
        (["--shuffle-seed", "0"], "--shuffle-seed is for --dataset"),
        (["--dataset", "gsm8k", "--field", "text"], "--field is for --prompts; with --dataset, use --template"),
        (["--dataset", "gsm8k", "--limit", "3"], "use --num-samples"),
        (["--dataset", "novels"], "cnn_dm_summarization"),
        (["--dataset", "custom_jsonl", "--data-path", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--output-dir", __file__], "can't be used"),
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
        (["--model", "nowhere"], "no folder or file 'nowhere'"),
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
