"""`layerskip train`: what is refused at the command line, in one line, and what is printed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip.training.config import TrainingConfig
from layerskip.training.settings_file import read_settings

SHORT = ("--sequence-length", "32", "--batch-size", "2", "--max-steps", "2", "--held-out", "0.2")


@pytest.fixture(scope="module")
def start(training_start: Callable) -> tuple[str, str]:
    shape, texts = training_start(texts=5, lines=20, num_hidden_layers=3, max_position_embeddings=64)
    return str(shape), str(texts)


@pytest.fixture(scope="module")
def shape(start: tuple[str, str]) -> str:
    return start[0]


@pytest.fixture(scope="module")
def texts(start: tuple[str, str]) -> str:
    return start[1]


@pytest.fixture
def refusal(cli: Callable, tmp_path: Path) -> Callable[..., str]:
    """Call with arguments that must be refused in the last line of standard error, which is returned."""

    def call(*argv: str, output: str | None = None) -> str:
        outcome = cli("train", *argv, "--output", output or str(tmp_path / "run"))
        *before, last = outcome.err.splitlines()
        assert (outcome.code, outcome.out) == (2, "")
        assert last.startswith("layerskip: error: ")
        preparing = ("preparing the model", "reading the data", "computing in ")
        assert all(line.startswith(preparing) for line in before)
        return last

    return call


def test_nothing_to_train(refusal: Callable, texts: str) -> None:
    message = refusal("--data", texts, *SHORT)
    assert "name a model ('demo', 'smollm2', 'gemma3-270m', a folder, a GGUF file, or a hub id" in message
    assert "or a shape to train from scratch with config (small" in message


def test_both_a_model_and_a_shape(refusal: Callable, texts: str) -> None:
    assert "leave out model" in refusal("--model", "demo", "--config", "small", "--data", texts)


@pytest.mark.parametrize("name", ["smal", "nothing.json", "./no/folder"])
def test_unknown_shape(refusal: Callable, texts: str, name: str) -> None:
    assert name in refusal("--config", name, "--data", texts, *SHORT)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "unheard-of"}'])
def test_files_that_are_no_shape(refusal: Callable, texts: str, tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert str(file) in refusal("--config", str(file), "--data", texts, *SHORT)


def test_shapes_that_do_not_fit_together(refusal: Callable, texts: str, training_start: Callable) -> None:
    file, _ = training_start(texts=0, hidden_act="unheard-of")
    assert f"can't make a causal model from {file}" in refusal("--config", str(file), "--data", texts, *SHORT)


def test_no_data(refusal: Callable, shape: str) -> None:
    assert "no data was named; data can be python-stdlib" in refusal("--config", shape, *SHORT)


def test_missing_data(refusal: Callable, shape: str, tmp_path: Path) -> None:
    path = str(tmp_path / "nothing")
    assert f"there is no file or folder '{path}'" in refusal("--config", shape, "--data", path, *SHORT)


def test_empty_data(refusal: Callable, shape: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "a.txt").write_text(" \n")
    assert f"there is no text in {folder}" in refusal("--config", shape, "--data", str(folder), *SHORT)


def test_too_little_data_for_a_batch(refusal: Callable, shape: str, texts: str) -> None:
    message = refusal("--config", shape, "--data", texts, *SHORT, "--batch-size", "1000")
    assert "a batch of all processes has 1000; add data, or lower batch_size" in message


def test_blocks_longer_than_the_context(refusal: Callable, shape: str, texts: str) -> None:
    message = refusal("--config", shape, "--data", texts, *SHORT, "--sequence-length", "65")
    assert "sequence_length is 65 tokens, and the model's context 64; lower it" in message


def test_a_rotation_beyond_the_layers(refusal: Callable, shape: str, texts: str) -> None:
    message = refusal("--config", shape, "--data", texts, *SHORT, "--rotation", "4")
    assert "rotation is 4, but the model has 3 layers; it must be from 1 to 3" in message


def test_exits_that_the_model_does_not_have(refusal: Callable, shape: str, texts: str) -> None:
    message = refusal("--config", shape, "--data", texts, *SHORT, "--exit-layers", "1", "4")
    assert "exit_layers names 4, but the model has 3 layers; give numbers from 1 to 3" in message
    message = refusal("--config", shape, "--data", texts, *SHORT, "--exit-layers", "1", "--rotation", "3")
    assert "rotation is 3, but 2 exits learn; it must be from 1 to 2" in message


def test_a_tokenizer_larger_than_the_vocabulary(
    refusal: Callable, shape: str, texts: str, demo_config: dict[str, int]
) -> None:
    message = refusal("--config", shape, "--tokenizer", "demo", "--data", texts, *SHORT)
    assert f"the tokenizer has {demo_config['vocab_size']} tokens, and the model a vocabulary of 300" in message


def test_a_vocabulary_below_all_bytes(refusal: Callable, texts: str) -> None:
    message = refusal("--config", "small", "--vocab-size", "100", "--data", texts, *SHORT)
    assert "vocab_size must be a whole number of at least 259" in message


def test_no_output(cli: Callable, shape: str, texts: str) -> None:
    outcome = cli("train", "--config", shape, "--data", texts)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "output is missing: name the folder of the run with --output DIR" in outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--drop-out-max", "0.1"], "--drop-out-max"),
        (["--learning-rat", "0.1"], "did you mean --learning-rate?"),
        (["--max-steps", "0"], "max_steps must be a number from 1 on, got 0"),
        (["--dropout-max", "1"], "dropout_max must be at least 0 and below 1, got 1"),
        (["--exit-loss", "mse"], "'mse'"),
        (["--toml"], "--toml"),
        (["--toml", "no.toml"], "no.toml can't be read: No such file"),
        (["--lora-rank", "2"], "lora_rank needs a trained model"),
        (["--report-to", "carrier-pigeon", "--model", "demo", "--data", "X"], "report_to: 'carrier-pigeon' is unknown"),
    ],
)
def test_bad_flags(refusal: Callable, texts: str, flags: list[str], words: str) -> None:
    assert words in refusal(*(texts if flag == "X" else flag for flag in flags))


def test_paths_that_are_no_text(refusal: Callable, shape: str) -> None:
    assert "not text in UTF-8" in refusal("--config", shape, "--data", "a\udcff", *SHORT)


def test_outputs_that_can_not_be(refusal: Callable, shape: str, texts: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = ("--config", shape, "--data", texts, *SHORT)
    assert "file is a file; name a folder" in refusal(*run, output=str(tmp_path / "file"))
    assert "can't be written to" in refusal(*run, output=str(tmp_path / "file" / "below"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "holds a model, which training would overwrite" in refusal(*run, output=str(tmp_path / "model"))


def test_a_mistake_does_not_use_up_the_output(
    cli: Callable, refusal: Callable, shape: str, texts: str, tmp_path: Path
) -> None:
    """The next try may go to the same folder, and doesn't find what the one that failed has left there."""
    assert "nothing" in refusal("--config", shape, "--data", "/nothing.txt", *SHORT)
    refusal("--config", shape, "--data", texts, *SHORT, "--rotation", "4")  # has trained a tokenizer
    other, output = tmp_path / "other.txt", tmp_path / "run"
    other.write_text("qqqqqqqq " * 1000)
    outcome = cli("train", "--config", shape, "--data", str(other), *SHORT, "--output", str(output))
    assert (outcome.code, outcome.out.count("the model is in")) == (0, 1)
    vocabulary = json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]
    assert "qqqq" in vocabulary
    assert "fo" not in vocabulary


def test_json_is_all_on_standard_output(cli: Callable, shape: str, texts: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcome = cli("train", "--config", shape, "--data", texts, *SHORT, "--output", str(output), "--json")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    record = json.loads(outcome.out)
    assert record["step"] == 2
    assert record["num_tokens"] == 2 * 2 * 32
    assert len(record["exits"]) == 3
    assert json.loads((output / "training.json").read_text()) == {k: v for k, v in record.items() if k != "plot"}


def test_progress_without_a_terminal(cli: Callable, shape: str, texts: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcome = cli("train", "--config", shape, "--data", texts, *SHORT, "--output", str(output))
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert (lines[0], lines[2]) == ("preparing the model", "reading the data")
    assert re.fullmatch(r"computing in (float32|bfloat16): \S.+", lines[1])
    assert lines[3].startswith("step 1 of 2, ")
    assert lines[3].endswith(" tokens/s")
    assert re.fullmatch(
        r"step 2: held-out loss \d\.\d{3}, agreement [\d.]+% at exit 1(, [\d.]+% at exit 2)?; "
        r"ideal speedup [\d.]+ at exit \d",
        lines[-1],
    )
    assert "\x1b" not in outcome.err + outcome.out
    assert "exit layer" in outcome.out
    assert f"--model {output} --exit-layer " in outcome.out


def test_flags_come_on_top_of_a_file(cli: Callable, refusal: Callable, texts: str, tmp_path: Path) -> None:
    """The flags needn't make sense without the file."""
    file = tmp_path / "settings.toml"
    file.write_text(f"[start]\nmodel = 'demo'\n[data]\ndata = ['{texts}']\nsequence_length = 32\n[recipe]\nrotation=99")
    assert "rotation is 99" in refusal("--toml", str(file), "--lora-rank", "2")
    assert "rotation is 98" in refusal(f"--toml={file}", "--rotation", "98")
    settings = read_settings(tmp_path / "run" / "training.toml", TrainingConfig)
    assert (settings.start.model, settings.data.sequence_length, settings.recipe.rotation) == ("demo", 32, 98)
    assert "leave out model" in refusal("--toml", str(file), "--config", "small")
