"""Costs that are kept from one process to the next, and when they are measured again."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from layerskip.decoding.adaptive import cost_cache
from layerskip.decoding.adaptive.cost_cache import find_costs
from layerskip.decoding.adaptive.costs import Costs, measure_costs
from layerskip.files import cache_folder
from layerskip.language_model import LanguageModel
from layerskip.model.decoder import Decoder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(cost_cache, "TOLERANCE", 1e6)  # steps of a tiny network take any time
    return tmp_path / "costs"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes that are measured, as it happens."""
    sizes: list[int] = []

    def measure(decoder: Decoder, num_rows: int) -> Costs:
        sizes.append(num_rows)
        return measure_costs(decoder, num_rows)

    monkeypatch.setattr(cost_cache, "measure_costs", measure)
    return sizes


def test_costs_are_measured_once(text_lm: LanguageModel, folder: Path, measured: list[int]) -> None:
    first = find_costs(text_lm.decoder, 1)
    assert find_costs(text_lm.decoder, 1) == first
    find_costs(text_lm.decoder, 2)
    assert measured == [1, 2]
    assert len(list(folder.iterdir())) == 2


def test_other_conditions_have_costs_of_their_own(
    text_lm: LanguageModel, folder: Path, measured: list[int], tiny_checkpoint: Callable[..., Path]
) -> None:
    find_costs(text_lm.decoder, 1)
    torch.set_num_threads(2)
    try:
        find_costs(text_lm.decoder, 1)
    finally:
        torch.set_num_threads(1)
    assert measured == [1, 1]
    assert len(list(folder.iterdir())) == 2


def test_costs_that_no_longer_hold_are_measured_again(
    text_lm: LanguageModel, folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = find_costs(text_lm.decoder, 1)
    (file,) = folder.iterdir()
    slow = {**asdict(costs), "fixed": [1000 * value + 1 for value in costs.fixed]}
    file.write_text(json.dumps(slow))
    monkeypatch.setattr(cost_cache, "TOLERANCE", 100.0)
    assert find_costs(text_lm.decoder, 1).step() < 1
    assert measured == [1, 1]
    assert json.loads(file.read_text())["fixed"][0] < 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_layers": 4}', "no json"])
def test_broken_files_are_replaced(text_lm: LanguageModel, folder: Path, measured: list[int], content: str) -> None:
    find_costs(text_lm.decoder, 1)
    (file,) = folder.iterdir()
    file.write_text(content)
    find_costs(text_lm.decoder, 1)
    assert find_costs(text_lm.decoder, 1).num_layers == text_lm.decoder.num_layers
    assert measured == [1, 1]


def test_a_folder_that_cannot_be_written_costs_time_only(
    text_lm: LanguageModel, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "file"))
    find_costs(text_lm.decoder, 1)
    find_costs(text_lm.decoder, 1)
    assert measured == [1, 1]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LAYERSKIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "layerskip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "layerskip"
