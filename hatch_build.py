"""Compiles native/ into libraries in src/layerskip when the package is built or installed, where there is a compiler.

Without one, or if compiling fails, the package is complete all the same: it runs in torch. On x86 there are four
libraries; the package loads the one that suits the processor.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # compiling in a checkout that isn't installed needs no build tool
    BuildHookInterface = object

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wall", "-Wextra"]


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512VNNI = [*AVX512, "-mavx512vnni"]
AVX512BF16 = [*AVX512VNNI, "-mavx512bf16"]


def targets() -> dict[str, list[str]]:
    """The libraries for this kind of processor, and the flags of their instruction sets; every 64-bit ARM has NEON."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"_native.so": []}
    information = Path("/proc/cpuinfo")
    if information.exists() and not {"avx2", "fma", "f16c"} <= set(information.read_text().split()):
        return {"_native.so": []}
    return {
        "_native.so": AVX2,
        "_native_avx512.so": AVX512,
        "_native_avx512vnni.so": AVX512VNNI,
        "_native_avx512bf16.so": AVX512BF16,
    }


def compile_libraries(sources: Path, folder: Path) -> dict[str, str | None]:
    """Compile all libraries for this kind of processor; returns for each file why it didn't work, or None."""
    wanted = targets()
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda name: compile_library(sources, folder / name, wanted[name]), wanted)
        return dict(zip(wanted, problems, strict=True))


def compile_library(sources: Path, library: Path, target: Sequence[str]) -> str | None:
    """Compile all sources below a folder into one library.

    Args:
        sources: The folder, which is also where includes are looked up.
        library: File to write. An older one is replaced at once, or stays if compiling fails.
        target: Compiler flags of the instruction set.

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
        flags = [*FLAGS, *target, f"-I{sources}"]
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
        built = []
        for name, problem in compile_libraries(root / "native", root / "src" / "layerskip").items():
            if problem is None:
                built.append(f"src/layerskip/{name}")
            else:
                print(f"layerskip: {name} wasn't built, which slows everything down: {problem}", file=sys.stderr)
        if not built:
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["artifacts"].extend(built)


def _platform_tag() -> str:
    from packaging.tags import sys_tags

    return next(sys_tags()).platform
