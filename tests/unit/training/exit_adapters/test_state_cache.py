"""States of a frozen model on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerskip.errors import InvalidArgumentError
from layerskip.training.exit_adapters import state_cache
from layerskip.training.exit_adapters.state_cache import KEY_BYTES, StateCache


def open_cache(folder: Path, **changes: Any) -> StateCache:
    options = {"num_blocks": 4, "length": 3, "channels": 5, "dtype": torch.bfloat16, "states_of": {"weights": "a"}}
    return StateCache(folder, **{**options, **changes})


def tokens(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    cache, states = open_cache(tmp_path / "states"), torch.randn(2, 3, 5).bfloat16()
    ids, positions = tokens([1, 2, 3], [4, 5, 6]), tokens([0, 1, 2], [0, 1, 0])
    assert cache.get(ids, positions) is None
    cache.put(ids, positions, states)
    for again in (cache, open_cache(tmp_path / "states")):
        found = again.get(ids.flip(0), positions.flip(0))
        assert found is not None
        assert torch.equal(found, states.flip(0))
        assert again.get(ids, positions + 1) is None
        assert again.get(ids, None) is None
        assert len(again) == 2


def test_a_key_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.put(tokens([1, 2, 3], [4, 5, 6]), None, torch.ones(2, 3, 5))
    file = tmp_path / "keys.bin"
    file.write_bytes(file.read_bytes()[: KEY_BYTES + 3])
    again = open_cache(tmp_path)
    assert again.get(tokens([1, 2, 3]), None) is not None
    assert again.get(tokens([4, 5, 6]), None) is None
    again.put(tokens([7, 8, 9]), None, torch.full((1, 3, 5), 2.0))
    assert open_cache(tmp_path).get(tokens([7, 8, 9]), None) is not None


@pytest.mark.parametrize(
    "change", [{"states_of": {"weights": "b"}}, {"channels": 6}, {"length": 4}, {"dtype": torch.float32}]
)
def test_states_of_something_else_are_deleted(tmp_path: Path, change: dict[str, Any]) -> None:
    open_cache(tmp_path).put(tokens([1, 2, 3]), None, torch.ones(1, 3, 5))
    assert len(open_cache(tmp_path)) == 1
    assert len(open_cache(tmp_path, **change)) == 0


def test_what_there_is_no_room_for_is_left_out(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, num_blocks=1)
    cache.put(tokens([1, 2, 3], [4, 5, 6]), None, torch.ones(2, 3, 5))
    assert cache.get(tokens([1, 2, 3]), None) is not None
    assert cache.get(tokens([4, 5, 6]), None) is None


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=20))
    with pytest.raises(InvalidArgumentError, match=r"cache_states needs .* GB are free; leave it out"):
        open_cache(tmp_path / "new")
    assert not (tmp_path / "new").exists()
