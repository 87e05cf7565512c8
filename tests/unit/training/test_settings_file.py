"""Settings as TOML: what is written reads the same, and every mistake is named."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.config import (
    CheckpointConfig,
    LayerSkipConfig,
    OptimizationConfig,
    StartConfig,
    TrainingConfig,
)
from layerskip.training.data.config import DataConfig
from layerskip.training.settings_file import read_settings, write_settings

EVERYTHING = TrainingConfig(
    start=StartConfig(model="a/b", revision="main", lora_rank=4, lora_alpha=9),
    data=DataConfig(data=("python-stdlib", "x y"), text_field="body", suffixes=(".py", ".md"), max_documents=3),
    recipe=LayerSkipConfig(
        dropout_max=0.3,
        dropout_schedule="constant",
        exit_loss="lk",
        exit_loss_scale=1e-05,
        exit_weights="equal",
        exit_layers=(2, 4),
        curriculum="gradual",
        rotation=3,
        stop_gradient=True,
    ),
    optimization=OptimizationConfig(learning_rate=1e-7, warmup_steps=0, precision="bfloat16", compile=True, seed=2**62),
    checkpoints=CheckpointConfig(save_dtype="float16", report_to=("tensorboard", "wandb")),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def read(file: Path, text: str) -> TrainingConfig:
    file.write_text(text, encoding="utf-8")
    return read_settings(file, TrainingConfig)


def refusal(file: Path, text: str) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        read(file, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("settings", [TrainingConfig(), EVERYTHING], ids=["defaults", "everything"])
def test_what_is_written_reads_the_same(file: Path, settings: TrainingConfig) -> None:
    assert read(file, write_settings(settings)) == settings


NAMES = [
    'a "quoted" name',
    "C:\\texts\\new",
    "tab\tline\nbreak\rend",
    "\x00\x1f\x7f",
    "Grüße, 日本語, 😀",
    "# not a comment",
    "'''",
    "[table]",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_survives(file: Path, name: str) -> None:
    settings = TrainingConfig(start=StartConfig(model=name), data=DataConfig(data=(name, "b")))
    assert read(file, write_settings(settings)) == settings


def test_text_that_no_file_can_hold() -> None:
    with pytest.raises(InvalidArgumentError, match="not text in UTF-8"):
        write_settings(TrainingConfig(data=DataConfig(data=("a\udcff",))))


def test_every_default_is_written_and_none_is_left_out() -> None:
    tables = tomllib.loads(write_settings(TrainingConfig()))
    assert tables["optimization"]["adam_beta2"] == 0.95
    assert tables["checkpoints"]["report_to"] == []
    assert "learning_rate" not in tables["optimization"]
    assert tables["start"] == {}


def test_what_is_left_out_keeps_its_default(file: Path) -> None:
    assert read(file, "") == TrainingConfig()
    assert read(file, "[recipe]\nrotation = 3") == TrainingConfig(recipe=LayerSkipConfig(rotation=3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[recipes]\nrotation = 3", ["unknown name 'recipes'", "did you mean 'recipe'?"]),
        ("[recipe]\nrotations = 3", ["recipe: unknown name 'rotations'", "did you mean 'rotation'?"]),
        ("[optimization]\nlearning-rate = 1.0", ["did you mean 'learning_rate'?"]),
        ("rotation = 3", ["unknown name 'rotation'"]),
        ("[zzz]", ["it knows start, data, recipe, adapters, optimization, checkpoints"]),
        ("[recipe]\nqqq = 1", ["it knows dropout_max,"]),
        ("recipe = 3", ["recipe must be a table, got 3"]),
        ("[[recipe]]\nrotation = 3", ["recipe must be a table"]),
    ],
)
def test_unknown_names(file: Path, text: str, words: list[str]) -> None:
    message = refusal(file, text)
    for word in [str(file), *words]:
        assert word in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("recipe.rotation = true", "rotation must be a whole number, got True"),
        ("recipe.rotation = 3.0", "rotation must be a whole number, got 3.0"),
        ("recipe.rotation = '3'", "rotation must be a whole number, got '3'"),
        ("recipe.dropout_max = '0.1'", "dropout_max must be a number, got '0.1'"),
        ("recipe.dropout_max = false", "dropout_max must be a number, got False"),
        ("recipe.stop_gradient = 1", "stop_gradient must be true or false, got 1"),
        ("recipe.stop_gradient = 'yes'", "stop_gradient must be true or false, got 'yes'"),
        ("start.model = 3", "model must be a text, got 3"),
        ("start.model = ['a']", "model must be a text, got ['a']"),
        ("data.data = 'a'", "data must be a list of texts, got 'a'"),
        ("data.data = ['a', 3]", "data must be a list of texts"),
        ("recipe.exit_layers = [4, 'a']", "exit_layers must be a list of whole numbers, got [4, 'a']"),
        ("recipe.exit_layers = [true]", "exit_layers must be a list of whole numbers, got [True]"),
        ("optimization.seed = 2026-01-01", "seed must be a whole number"),
        ("recipe.exit_loss = 'mse'", "exit_loss must be one of ce, kl, lk, got 'mse'"),
        ("recipe.exit_loss = ['ce']", "exit_loss must be one of ce, kl, lk"),
        ("recipe.dropout_schedule = 'linear'", "dropout_schedule must be one of constant, exponential, got 'linear'"),
        ("optimization.precision = 16", "precision must be one of auto, float32, bfloat16, got 16"),
    ],
)
def test_values_of_the_wrong_type(file: Path, line: str, words: str) -> None:
    message = refusal(file, line)
    assert words in message
    assert str(file) in message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1.0", "-0.1"])
def test_values_out_of_range(file: Path, value: str) -> None:
    assert "dropout_max must be at least 0 and below 1" in refusal(file, f"recipe.dropout_max = {value}")


def test_a_whole_number_is_a_number(file: Path) -> None:
    settings = read(file, "recipe.exit_loss_scale = 1\noptimization.learning_rate = 1")
    assert settings.recipe.exit_loss_scale == 1.0
    assert isinstance(settings.recipe.exit_loss_scale, float)
    assert isinstance(settings.optimization.learning_rate, float)


@pytest.mark.parametrize("content", [b"[recipe", b"rotation 3", b'{"recipe": 3}', b"a = 1\na = 2", b"\xff\xfe"])
def test_files_that_are_no_toml(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError) as caught:
        read_settings(file, TrainingConfig)
    assert f"{file} is not TOML" in str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidArgumentError) as caught:
            read_settings(path, TrainingConfig)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_settings_that_contradict_each_other(file: Path) -> None:
    text: Any = "[start]\nmodel = 'demo'\nconfig = 'small'"
    assert "leave them out, or leave out model" in refusal(file, text)
