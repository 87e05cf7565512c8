"""The best setting beside a checkpoint, and who follows it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import layerskip
from layerskip.checkpoint.folder import TUNED_FILE
from layerskip.checkpoint.tuned import TunedSettings, read_tuned, write_tuned
from layerskip.decoding.adaptive.experience import Experience
from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.language_model import LanguageModel

TUNED = TunedSettings(
    exit_layer=3, num_speculations=2, tokens_per_second=100.0, speedup=1.5, agreement={1: 0.25, 3: 0.75}
)


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def load(folder: Path) -> LanguageModel:
    return layerskip.load(str(folder), kernels="torch")


def test_settings_come_back(folder: Path) -> None:
    assert read_tuned(folder / TUNED_FILE, 4) is None
    write_tuned(folder / TUNED_FILE, TUNED)
    assert read_tuned(folder / TUNED_FILE, 4) == TUNED


def test_self_speculation_takes_what_is_open(folder: Path) -> None:
    untuned = load(folder)
    assert untuned.configure(generation_strategy="self_speculative").exit_layer is None
    write_tuned(folder / TUNED_FILE, TUNED)
    lm = load(folder)
    open_ = lm.configure(generation_strategy="self_speculative")
    assert (open_.exit_layer, open_.num_speculations) == (3, 2)
    assert lm.configure(num_speculations=7).exit_layer == 3
    named = lm.configure(exit_layer=1)
    assert (named.exit_layer, named.draft_length) == (1, 4)  # the draft length was found for another exit
    assert lm.configure().strategy == "adaptive"
    assert lm.configure(generation_strategy="autoregressive").exit_layer is None
    result = lm.generate([[1, 2, 3]], generation_strategy="self_speculative", max_new_tokens=20)[0]
    assert len(result.stats.drafted_by_position) <= 2
    assert result.token_ids == untuned.generate([[1, 2, 3]], max_new_tokens=20)[0].token_ids


def test_adaptive_decoding_starts_from_the_sweep(folder: Path) -> None:
    decoder = load(folder).decoder
    experience = Experience(decoder, TUNED)
    assert 3 in experience.policy().exits
    assert 3 not in Experience(decoder).policy().exits
    rates = experience.rates(samples=False)
    assert rates.of_exit(1).overall.value < 0.4 < 0.6 < rates.of_exit(3).overall.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "delete it"),
        ("[]", "delete it"),
        ("{}", "delete it"),
        ('{"exit_layer": 9, "num_speculations": 2, "tokens_per_second": 1, "speedup": 1}', "exit layer 9"),
        ('{"exit_layer": "x", "num_speculations": 2, "tokens_per_second": 1, "speedup": 1}', "delete it"),
    ],
)
def test_files_of_something_else(folder: Path, content: str, message: str) -> None:
    (folder / TUNED_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InvalidArgumentError, match="copy the checkpoint"):
        write_tuned(tmp_path / "file" / TUNED_FILE, TUNED)
