"""`layerskip batch`: flags, exit codes, summaries."""

import json
import sys
from pathlib import Path

import pytest

from layerskip.cli.batch import run
from layerskip.cli.flags.arguments import ModelArguments
from layerskip.cli.flags.ray import anywhere
from layerskip.errors import InvalidArgumentError

SHORT = ["--max-new-tokens", "4"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[str], Path]:
    """Flags for a file of three prompts and its output, and the output."""
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("def f(", "import os", "class A:")))
    return ["--input", str(file), "--field", "text", "--output-file", str(output), *SHORT], output


def test_a_batch_is_written_and_summarised(files: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags, output = files
    assert run([*flags, "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    assert "3 lines written to" in shown.out
    assert "12 tokens" in shown.out
    assert shown.err == ""
    records = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2]
    with pytest.raises(InvalidArgumentError, match="exists already"):
        run(flags)


def test_json_has_the_summary_and_errors_make_exit_code_1(
    files: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, output = files
    with Path(flags[1]).open("a") as file:
        file.write('{"text": ""}\n')
    assert run([*flags, "--json"]) == 1
    shown = capsys.readouterr().out
    summary = json.loads(shown)
    assert (summary["lines"], summary["errors"], summary["resumed"], summary["tokens"]) == (4, 1, 0, 12)
    assert summary["output_file"] == str(output)
    output.unlink()
    assert run(flags) == 1
    assert "errors: 1" in capsys.readouterr().out


def test_batches_of_any_size_and_strategy_write_the_same(files: tuple[list[str], Path]) -> None:
    flags, output = files
    texts = set()
    for more in (["--batch-size", "1"], ["--batch-size", "3"], ["--exit-layer", "4", "--num-speculations", "3"]):
        assert run([*flags, "--temperature", "0.9", "--seed", "2", *more]) == 0
        records = [json.loads(line) for line in output.read_bytes().splitlines()]
        texts.add(json.dumps([(record["token_ids"], record["seed"]) for record in records]))
        output.unlink()
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--num-workers", "2"], "--num-workers is for --ray"),
        (["--ray", "--num-workers", "0"], "num_workers must be at least 1"),
        (["--ray", "--device", "cuda:1"], "can't be chosen with --ray"),
        (["--exit-layer", "99"], "exit"),
    ],
)
def test_bad_flags_are_refused(files: tuple[list[str], Path], more: list[str], message: str) -> None:
    flags, output = files
    with pytest.raises(InvalidArgumentError, match=message):
        run([*flags, *more])
    assert not output.exists()


def test_without_ray_the_extra_is_named(files: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    flags, _ = files
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'layerskip\[ray\]'"):
        run([*flags, "--ray"])


def test_paths_hold_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    there = anywhere(ModelArguments(model="model", draft_text=Path("text.txt")))
    assert there.model == str(tmp_path / "model")
    assert there.draft_text == tmp_path / "text.txt"
    for name in ("demo", "owner/name"):
        assert anywhere(ModelArguments(model=name)) == ModelArguments(model=name)
