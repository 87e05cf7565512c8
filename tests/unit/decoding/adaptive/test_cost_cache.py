"""Costs that are kept from one process to the next."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerskip.decoding.adaptive.cost_cache import read_costs, write_costs
from layerskip.decoding.adaptive.costs import Costs, measure_costs
from layerskip.files import cache_folder
from layerskip.language_model import LanguageModel


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    return tmp_path / "costs"


@pytest.fixture(scope="module")
def costs(text_lm: LanguageModel) -> Costs:
    return replace(measure_costs(text_lm.decoder, 1), adapters={2: 0.25})


def test_costs_are_kept_by_batch_size(text_lm: LanguageModel, folder: Path, costs: Costs) -> None:
    assert read_costs(text_lm.decoder, 1) is None
    write_costs(text_lm.decoder, 1, costs)
    assert read_costs(text_lm.decoder, 1) == costs
    assert read_costs(text_lm.decoder, 2) is None
    assert len(list(folder.iterdir())) == 1


def test_other_conditions_have_costs_of_their_own(text_lm: LanguageModel, folder: Path, costs: Costs) -> None:
    write_costs(text_lm.decoder, 1, costs)
    torch.set_num_threads(2)
    try:
        assert read_costs(text_lm.decoder, 1) is None
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_layers": 4}', "no json"])
def test_broken_files_are_replaced(text_lm: LanguageModel, folder: Path, costs: Costs, content: str) -> None:
    write_costs(text_lm.decoder, 1, costs)
    (file,) = folder.iterdir()
    file.write_text(content)
    assert read_costs(text_lm.decoder, 1) is None
    write_costs(text_lm.decoder, 1, costs)
    assert read_costs(text_lm.decoder, 1) == costs


def test_a_folder_that_cannot_be_written_costs_time_only(
    text_lm: LanguageModel, tmp_path: Path, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "file"))
    write_costs(text_lm.decoder, 1, costs)
    assert read_costs(text_lm.decoder, 1) is None


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LAYERSKIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "layerskip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "layerskip"
