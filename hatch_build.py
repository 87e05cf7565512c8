"""Compiles native/ into src/layerskip/_native.so when the package is built or installed, where there is a compiler.

Without one, or if compiling fails, the package is complete all the same: it runs in torch.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # compiling in a checkout that isn't installed needs no build tool
    BuildHookInterface = object

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wall", "-Wextra"]


def processor_flags() -> list[str]:
    """Flags for AVX2 and what comes with it, if this is an x86 processor that has it; every 64-bit ARM has NEON."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    information = Path("/proc/cpuinfo")
    if information.exists() and not {"avx2", "fma", "f16c"} <= set(information.read_text().split()):
        return []
    return ["-mavx2", "-mfma", "-mf16c"]


def compile_library(sources: Path, library: Path, target: Sequence[str] | None = None) -> str | None:
    """Compile all sources below a folder into one library.

    Args:
        sources: The folder, which is also where includes are looked up.
        library: File to write. An older one is replaced at once, or stays if compiling fails.
        target: Compiler flags of the instruction set; those of this processor if not given.

    Returns:
        Why it didn't work, or None.
    """
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    compiler = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if not compiler:
        return "no C++ compiler was found"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        files = sorted(map(str, sources.rglob("*.cpp")))
        flags = [*FLAGS, *(processor_flags() if target is None else target), f"-I{sources}"]
        command = [*compiler, *flags, *files, "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{compiler[0]}: {error}"
        if done.returncode != 0:
            return f"{shlex.join(command)}\n{done.stderr}"
        built.replace(library)
    return None


class NativeBuildHook(BuildHookInterface):
    """Hatch's hook (`tool.hatch.build.hooks.custom`)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before a wheel, editable or not, is put together."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / "src" / "layerskip" / "_native.so"
        problem = compile_library(root / "native", library)
        if problem is not None:
            print(f"layerskip: native kernels weren't built, everything runs in torch: {problem}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["artifacts"].append("src/layerskip/_native.so")


def _platform_tag() -> str:
    from packaging.tags import sys_tags

    return next(sys_tags()).platform
