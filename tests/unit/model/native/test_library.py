"""Which library is loaded, and which ones are refused."""

import ctypes
from pathlib import Path

import pytest

from layerskip.model.native import library as native
from layerskip.model.native.library import STRUCTURES, layout, load_library

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


def load_again() -> ctypes.CDLL | None:
    """Load the library without the cache of earlier calls."""
    return load_library.__wrapped__()


@needs_library
def test_structures_are_laid_out_alike() -> None:
    library = load_library()
    assert library is not None
    described = library.layerskip_layout().decode().splitlines()
    assert described == layout().splitlines()
    assert len(described) == len(STRUCTURES)


@needs_library
@pytest.mark.parametrize("change", ["size", "order", "name"])
def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    fields = list(native.StopRuleView._fields_)
    if change == "size":
        fields[0] = ("rates", ctypes.c_float * 7)
    elif change == "order":
        fields.reverse()
    else:
        fields[1] = ("most", ctypes.c_float)
    other = type("StopRuleView", (ctypes.Structure,), {"_fields_": fields})
    structures = tuple(other if structure is native.StopRuleView else structure for structure in STRUCTURES)
    assert load_again() is not None
    monkeypatch.setattr(native, "STRUCTURES", structures)
    assert load_again() is None


@needs_library
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert load_again() is None


@needs_library
def test_an_older_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.FUNCTIONS, "new_function", (None, []))
    assert load_again() is None


def test_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "other.so").write_text("not a library")
    assert load_library(tmp_path / "other.so") is None
    assert load_library(tmp_path / "missing.so") is None
