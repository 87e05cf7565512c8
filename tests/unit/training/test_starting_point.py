"""What training starts from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import convert

from layerskip.errors import CheckpointError
from layerskip.training.config import StartConfig, TrainingConfig
from layerskip.training.starting_point import make_starting_point


def test_a_gguf_file_is_no_shape(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It has no config.json; the message says what can be named instead."""
    file = convert(tiny_checkpoint(), tmp_path / "model.gguf")
    config = TrainingConfig(start=StartConfig(config=str(file)))
    with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file, which has no config\.json; name .*small"):
        make_starting_point(config, tokenizer_folder=tmp_path)
