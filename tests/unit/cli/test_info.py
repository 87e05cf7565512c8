"""`layerskip info`: what it says is true of this process."""

import json
from collections.abc import Callable

import pytest
import torch

from layerskip.files import cache_folder
from layerskip.machine import __version__
from layerskip.model.native.library import LIBRARIES, find_variants, load_library, target_of


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSKIP_CPU", raising=False)
    load_library.cache_clear()


def test_json(cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = cli("info", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(outcome.out)
    assert facts["versions"]["layerskip"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == {"count": torch.get_num_threads(), "because": "OMP_NUM_THREADS=1"}
    assert facts["folders"]["cache"] == str(tmp_path) == str(cache_folder())
    assert len(facts["devices"]) == torch.cuda.device_count()
    library = load_library()
    assert facts["kernels"]["chosen"] == (None if library is None else target_of(library))
    assert [entry["file"] for entry in facts["kernels"]["variants"]] == [
        path.name for path in LIBRARIES if path.exists()
    ]
    usable = [entry["target"] for entry in facts["kernels"]["variants"] if entry["usable"]]
    assert usable == [variant.target for variant in find_variants() if variant.library is not None]


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
def test_what_forces_a_library_is_named(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    target = [variant.target for variant in find_variants() if variant.library is not None][-1]
    monkeypatch.setenv("LAYERSKIP_CPU", target)
    assert f"{target}, LAYERSKIP_CPU={target}" in cli("info").out
    load_library.cache_clear()
    monkeypatch.setenv("LAYERSKIP_CPU", "avx3")
    outcome = cli("info")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "'avx3' (LAYERSKIP_CPU) can't be used: that library isn't known" in outcome.err
    load_library.cache_clear()


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
def test_a_library_of_another_version_is_shown(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.model.native.library.INTERFACE", 99)
    with pytest.warns(RuntimeWarning, match="was built for another version"):
        outcome = cli("info")
    assert "torch's: no compiled ones can run here" in outcome.out
    assert "was built for another version: interface" in " ".join(outcome.out.split())
    load_library.cache_clear()
