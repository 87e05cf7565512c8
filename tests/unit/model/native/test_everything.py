"""`tests/native/everything.cpp`: the same bits from all instruction sets, ARM's included, and nothing for sanitizers.

Sums have the same order everywhere: an output of a product is one sum over the inputs, whatever adds up lanes keeps
eight of them, and noise and exponentials are computed with the library's own polynomials. So bits are compared, with no
tolerance.
"""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from layerskip.model.native.library import find_variants

ROOT = Path(__file__).parents[4]
BUILD: dict[str, Any] = runpy.run_path(str(ROOT / "hatch_build.py"))
PROGRAM = ROOT / "tests" / "native" / "everything.cpp"
LIBRARIES = [variant.path for variant in find_variants() if variant.library is not None]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
SECONDS = 300
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the program is built as on Linux"),
    pytest.mark.skipif(not BUILD["find_compiler"](), reason="needs a C++ compiler"),
]


def compile_program(compiler: Sequence[str], flags: Sequence[str], program: Path) -> subprocess.CompletedProcess[str]:
    command = [*compiler, "-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'native'}", str(PROGRAM), *flags]
    return subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)


def results(command: Sequence[str | Path], **environment: str) -> list[str]:
    """What the program prints, if it found nothing wrong by itself."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer doesn't run on this kernel")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert done.stderr.endswith(": 0 wrong\n")
    return done.stdout.splitlines()


def with_library(library: Path, folder: Path) -> Path:
    """The program that calls a library of this machine."""
    program = folder / f"everything{library.stem}"
    done = compile_program(BUILD["find_compiler"](), [str(library)], program)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The results of the simplest library that can run here."""
    if not LIBRARIES:
        pytest.skip("the compiled kernels weren't built")
    lines = results([with_library(LIBRARIES[-1], tmp_path_factory.mktemp("program")), "1"])
    names = [line.rsplit(" ", 3)[0] for line in lines]
    assert len(names) == len(set(names)) > 100
    return lines


@pytest.mark.skipif(not LIBRARIES, reason="the compiled kernels weren't built")
@pytest.mark.parametrize("library", LIBRARIES, ids=[path.stem for path in LIBRARIES])
def test_libraries_agree_to_the_last_bit(library: Path, expected: list[str], tmp_path: Path) -> None:
    program = with_library(library, tmp_path)
    for threads in ("1", "3"):
        assert results([program, threads]) == expected


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CROSS) or not shutil.which(EMULATOR), reason=f"needs {CROSS} and {EMULATOR}")
@pytest.mark.parametrize("target", BUILD["ARM"])
def test_arm_agrees_to_the_last_bit(
    target: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries as they are built for ARM, on an emulated processor, and told apart from one that lacks them."""
    monkeypatch.setenv("CXX", CROSS)
    library, program = tmp_path / f"_native_{target}.so", tmp_path / "everything"
    assert BUILD["compile_library"](ROOT / "native", library, BUILD["ARM"][target]) is None
    done = compile_program([CROSS], [str(library)], program)
    assert done.returncode == 0, done.stderr
    run = [EMULATOR, "-L", SYSROOT, "-cpu", "max", program, "2"]
    assert results(run) == expected
    if target != "neon":
        run[4] = "cortex-a53"
        old = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=False)
        assert (old.returncode, old.stdout) == (77, f"needs {target}\n")


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizers", "runtime"), [("thread", "tsan"), ("address,undefined", "asan")])
def test_sanitizers_find_nothing(sanitizers: str, runtime: str, expected: list[str], tmp_path: Path) -> None:
    """With more threads than cores, so that they meet at other places each time."""
    name = LIBRARIES[-1].name
    sources = sorted(map(str, (ROOT / "native").rglob("*.cpp")))
    flags = ["-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *BUILD["targets"]()[name], *sources]
    done = compile_program(BUILD["find_compiler"](), ["-fno-math-errno", *flags], tmp_path / "everything")
    if done.returncode and any(
        f"lib{part}" in done.stderr or f"-l{part}" in done.stderr for part in (runtime, "ubsan")
    ):
        pytest.skip(f"the compiler has no runtime for {sanitizers}")
    assert done.returncode == 0, done.stderr
    found = results([tmp_path / "everything", "3", "2"], TSAN_OPTIONS="halt_on_error=1")
    half = len(found) // 2
    assert found[:half] == found[half:]
    # Without optimization, products and sums aren't fused, so that numbers differ a little from the library's.
    assert [line.rsplit(" ", 3)[0] for line in found[:half]] == [line.rsplit(" ", 3)[0] for line in expected]
