"""A small network in whole rounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder


@pytest.fixture
def load_decoder(
    tiny_checkpoint: Callable[..., Path], load_static: Callable[..., LanguageModel]
) -> Callable[..., GraphDecoder]:
    """Loads Mistral with a window of 7, in whole rounds."""

    def load(**options: Any) -> GraphDecoder:
        decoder = load_static(tiny_checkpoint("mistral", sliding_window=7), **options).decoder
        assert isinstance(decoder, GraphDecoder)
        return decoder

    return load


@pytest.fixture
def decoder(load_decoder: Callable[..., GraphDecoder]) -> GraphDecoder:
    return load_decoder()
