"""The kernels' threads under ThreadSanitizer, with more of them than there are cores."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
