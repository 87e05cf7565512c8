"""How many threads compute, and the kernels' threads under ThreadSanitizer, with more of them than there are cores."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import layerskip
from layerskip.cores import THREAD_VARIABLES, Cores
from layerskip.errors import InvalidArgumentError
from layerskip.model.native.threads import kernel_threads

ROOT = Path(__file__).parents[4]
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
def test_threads_have_no_races(tmp_path: Path) -> None:
    program = tmp_path / "stress"
    sources = [ROOT / "tests" / "native" / "team_stress.cpp", ROOT / "native" / "threads.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'native'}"]
    built = subprocess.run(
        [str(COMPILER), *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if "tsan" in built.stderr:
        pytest.skip("ThreadSanitizer isn't installed")
    assert built.returncode == 0, built.stderr
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(program), "2000"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer doesn't run on this kernel")
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
def test_loading_settles_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own default is lowered to the cores, a number that somebody has chosen isn't, and an option wins."""
    cores = Cores(logical=6, physical=4, fast=4, quota=None)
    monkeypatch.setattr("layerskip.cores.find_cores", lambda: cores)
    for before, asked, after in ((6, None, 4), (5, None, 5), (2, None, 2), (6, 6, 6), (1, 3, 3)):
        torch.set_num_threads(before)
        layerskip.load("demo", threads=asked)
        assert torch.get_num_threads() == kernel_threads() == after
    torch.set_num_threads(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    layerskip.load("demo")
    assert torch.get_num_threads() == 6


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_threads_are_a_positive_number(wrong: object) -> None:
    with pytest.raises(InvalidArgumentError, match="threads must be"):
        layerskip.load("demo", threads=wrong)
