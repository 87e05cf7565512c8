"""Which library is loaded, and which ones are refused."""

import ctypes
import re
import runpy
import shutil
from pathlib import Path

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.model.native import library as native
from layerskip.model.native.library import STRUCTURES, find_variants, layout, load_library

ROOT = Path(__file__).parents[4]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
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
    with pytest.warns(RuntimeWarning, match="its structures are laid out differently"):
        assert load_again() is None


@needs_library
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.warns(RuntimeWarning, match=f"interface {native.INTERFACE - 1}, and not {native.INTERFACE}"):
        assert load_again() is None


@needs_library
def test_an_older_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.FUNCTIONS, "new_function", (None, []))
    with pytest.warns(RuntimeWarning, match="it has no layerskip_new_function"):
        assert load_again() is None


def test_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "other.so").write_text("not a library")
    with pytest.warns(RuntimeWarning, match=r"^other.so can't be loaded"):
        assert load_library((tmp_path / "other.so", tmp_path / "missing.so")) is None


def compile_stub(tmp_path: Path, name: str, **results: str) -> Path:
    """A library whose functions return 0, but for those given."""
    results = {
        "interface": str(native.INTERFACE),
        "runs_here": "1",
        "target": '"avx2"',
        "missing": '""',
        "layout": f'R"({layout()})"',
        **results,
    }
    texts = ("layout", "target", "missing")
    types = {function: "const char*" if function in texts else "int" for function in native.FUNCTIONS}
    functions = (f"{types[name]} layerskip_{name}() {{ return {results.get(name, '0')}; }}" for name in types)
    sources = tmp_path / name
    (sources / "kernels").mkdir(parents=True)
    (sources / "kernels" / "stub.h").touch()
    (sources / "kernels" / "stub.cpp").write_text(
        "\n".join(['#include "kernels/stub.h"', 'extern "C" {', *functions, "}"])
    )
    library = tmp_path / f"{name}.so"
    assert runpy.run_path(str(ROOT / "hatch_build.py"))["compile_library"](sources, library, target=[]) is None
    return library


@needs_compiler
def test_the_first_library_that_runs_here_is_taken(tmp_path: Path) -> None:
    other_processor = compile_stub(tmp_path, "other_processor", runs_here="0", missing='"avx9 amx-fp4"')
    other_version = compile_stub(tmp_path, "other_version", interface="1")
    other_layout = compile_stub(tmp_path, "other_layout", layout='"Linear 40:\\n"')
    good, better = (compile_stub(tmp_path, name) for name in ("good", "better"))
    refused = (tmp_path / "_native_absent.so", other_processor, other_version, other_layout)
    problems = {variant.path.stem: variant.problem for variant in find_variants(refused)}
    assert problems == {
        "_native_absent": "isn't in this installation",
        "other_processor": "needs avx9, amx-fp4, which this processor or system lacks",
        "other_version": f"was built for another version: interface 1, and not {native.INTERFACE}",
        "other_layout": "was built for another version: its structures are laid out differently",
    }
    with pytest.warns(RuntimeWarning, match=r"^other_version.so was built.*; other_layout.so was built"):
        assert load_library(refused) is None
    for paths, wanted in (((*refused[:2], good), good), ((other_processor, better, good), better)):
        library = load_library(paths)
        assert library is not None
        assert library._name == str(wanted)


@needs_compiler
def test_a_library_of_another_version_is_named_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    paths = (compile_stub(tmp_path, "older", interface="1"), compile_stub(tmp_path, "good"))
    assert load_library(paths) is load_library(paths)
    (warning,) = recwarn
    assert str(warning.message).startswith("older.so was built for another version: interface 1")
    assert "\n" not in str(warning.message)


@needs_compiler
def test_an_instruction_set_can_be_insisted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tuple(compile_stub(tmp_path, name, target=f'"{name}"') for name in ("avx512", "avx2"))
    for target in ("avx512", "avx2"):
        library = load_library(paths, target)
        assert library is not None
        assert native.target_of(library) == target
    monkeypatch.setenv("LAYERSKIP_CPU", "avx2")
    chosen = load_library.__wrapped__(paths)
    assert chosen is not None
    assert native.target_of(chosen) == "avx2"
    with pytest.raises(InvalidArgumentError, match=re.escape("'avx3' (LAYERSKIP_CPU)") + ".* run here: avx512, avx2$"):
        load_library(paths, "avx3")
    with pytest.raises(InvalidArgumentError, match="run here: none"):
        load_library((), "avx2")


def test_the_loader_tries_what_is_compiled() -> None:
    targets = runpy.run_path(str(ROOT / "hatch_build.py"))["targets"]
    compiled = [name for machine in ("x86_64", "aarch64", "riscv64") for name in targets(machine)]
    assert set(compiled) <= {path.name for path in native.LIBRARIES}
    assert {path.parent for path in native.LIBRARIES} == {ROOT / "src" / "layerskip"}
    assert list(targets("AMD64")) == [f"_native_{name}.so" for name in ("avx2", "avx512", "avx512vnni", "avx512bf16")]
    assert list(targets("arm64")) == ["_native_neon.so", "_native_dotprod.so"]
