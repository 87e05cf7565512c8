"""`layerskip export` and its subcommands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import write_tiny_adapters

Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(tokenizer=True)


def test_without_a_subcommand_it_says_what_there_is(cli: Callable) -> None:
    assert cli("export").out == cli("export", "--help").out
    assert "draft" in cli("export").out


def test_draft(model: Path, tmp_path: Path, cli: Callable) -> None:
    outcome = cli("export", "draft", "--model", str(model), "--exit-layer", "2", "--output", str(tmp_path / "a"))
    assert outcome.code == 0
    assert "the first 2 of 4 layers" in outcome.out
    for engine in ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM", "transformers"):
        assert f"\n{engine}:\n" in outcome.out
    argv = ["--exit-layer", "2", "--output", str(tmp_path / "b"), "--num-speculations", "6", "--json"]
    content = json.loads(cli("export", "draft", "--model", str(model), *argv).out)
    assert (content["exit_layer"], content["num_layers"]) == (2, 4)
    assert '"num_speculative_tokens": 6' in content["commands"][0]["command"]


def test_gguf(model: Path, tmp_path: Path, cli: Callable) -> None:
    outcome = cli("export", "gguf", "--model", str(model), "--output", str(tmp_path / "a.gguf"))
    assert outcome.code == 0
    assert "all 4 layers, llama" in outcome.out
    argv = ["--output", str(tmp_path / "b.gguf"), "--exit-layer", "3", "--type", "q8_0", "--json"]
    content = json.loads(cli("export", "gguf", "--model", str(model), *argv).out)
    assert (content["exit_layer"], content["types"].keys()) == (3, {"Q8_0", "F16", "F32"})


def test_merge_and_split(model: Path, tmp_path: Path, cli: Callable) -> None:
    first, second = (str(write_tiny_adapters(tmp_path / str(exit_layer), model, [exit_layer])) for exit_layer in (1, 2))
    merged, out = str(tmp_path / "merged"), str(tmp_path / "out")
    argv = ["--model", str(model), "--exit-adapters", first, second, "--output", merged]
    assert json.loads(cli("export", "merge", *argv, "--json").out)["exits"] == [1, 2]
    outcome = cli("export", "split", "--model", merged, "--exits", "2", "--output", out, "--base", "owner/name")
    assert outcome.code == 0
    assert f"layerskip generate --model owner/name --exit-adapters {out}" in outcome.out


def test_push_without_uploading(model: Path, cli: Callable) -> None:
    outcome = cli("export", "push", "--folder", str(model), "--repo", "owner/new", "--dry-run")
    assert outcome.code == 0
    assert "would be uploaded to owner/new: README.md, config.json" in outcome.out
    argv = ["--folder", str(model), "--repo", "owner/new", "--dry-run", "--json"]
    content = json.loads(cli("export", "push", *argv).out)
    assert content["url"] is None
    assert content["card"] in outcome.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["draft"], "--exit-layer E and --output DIR are missing"),
        (["draft", "--exit-layer", "4"], "--output DIR is missing"),
        (["draft", "--exit-layer", "17", "--output", "new"], "exit_layer 17 is outside 1..16"),
        (["draft", "--exit-layer", "4", "--output", "there"], "exists and isn't empty"),
        (["draft", "--exit-layer", "4", "--output", "new", "--num-speculations", "0"], "num_speculations must be"),
        (["gguf", "--output", "/proc/a.gguf"], "can't be written"),
        (["gguf", "--output", "a.gguf", "--type", "q2_k"], "invalid choice 'q2_k'"),
        (["merge", "--output", "new"], "demo has no exit adapters"),
        (["split", "--output", "new"], "nothing to take out"),
        (["split", "--output", "new", "--exits", "two"], "--exits must be positive whole numbers"),
        (["push", "--folder", "there", "--repo", "a/b", "--dry-run"], "no model to upload"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    argv: list[str], message: str, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").touch()
    outcome = cli("export", *argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
