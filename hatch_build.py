"""Compiles native/ into libraries in src/layerskip when the package is built or installed, where there is a compiler.

There is one library for each instruction set of this kind of processor, whether or not the machine that builds has it:
the package takes the best one where it runs. Without a compiler, or if compiling fails, the package is complete all the
same: it runs in torch.
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

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-Wall", "-Wextra"]
BASELINE = ("kernels/target.cpp",)
"""Sources that run before it is known whether the processor has the instruction set: compiled without its flags."""

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512VNNI = [*AVX512, "-mavx512vnni"]
AVX512BF16 = [*AVX512VNNI, "-mavx512bf16"]
X86 = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vnni": AVX512VNNI,
    "avx512bf16": AVX512BF16,
}
"""Instruction sets of x86-64 and their flags; without AVX2 everything runs in torch."""
ARM = {
    "neon": [],  # which every 64-bit ARM has
    "dotprod": ["-march=armv8.2-a+dotprod"],
}
"""Those of 64-bit ARM."""


def targets(machine: str | None = None) -> dict[str, list[str]]:
    """Files to compile for a kind of processor, and the flags of their instruction sets.

    Args:
        machine: The processor's name as `platform.machine` has it; this machine's if not given.
    """
    name = (machine or platform.machine()).lower()
    known = X86 if name in ("x86_64", "amd64") else ARM if name in ("aarch64", "arm64") else {"generic": []}
    return {f"_native_{target}.so": flags for target, flags in known.items()}


def compile_libraries(sources: Path, folder: Path) -> dict[str, str | None]:
    """Compile all libraries for this kind of processor; returns for each file why it didn't work, or None."""
    wanted = targets()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = pool.map(lambda name: compile_library(sources, folder / name, wanted[name]), wanted)
        return dict(zip(wanted, problems, strict=True))


def find_compiler() -> list[str]:
    """The C++ compiler's command; empty if there is none."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    return shlex.split(os.environ.get("CXX", "")) or found[:1]


def needs(target: Sequence[str]) -> str:
    """Instruction sets that flags ask for, as `native/kernels/target.cpp` reads them: each behind a space."""
    names = []
    for flag in target:
        if flag.startswith("-march="):
            names += flag.split("+")[1:]
        elif flag.startswith("-m"):
            names.append(flag.removeprefix("-m"))
    return "".join(f" {name}" for name in names)


def compile_library(sources: Path, library: Path, target: Sequence[str]) -> str | None:
    """Compile all sources below a folder into one library.

    Args:
        sources: The folder, which is also where includes are looked up.
        library: File to write. An older one is replaced at once, or stays if compiling fails.
        target: Compiler flags of the instruction set.

    Returns:
        Why it didn't work, or None.
    """
    compiler = find_compiler()
    if not compiler:
        return "no C++ compiler was found"
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=library.parent) as folder:
        built, empty = Path(folder) / library.name, Path(folder) / "empty.cpp"
        empty.touch()
        if target and _run([*compiler, *target, "-fsyntax-only", str(empty)]) is not None:
            return f"the compiler {compiler[0]} doesn't know {' '.join(target)}"
        files = sorted(map(str, sources.rglob("*.cpp")))
        first = [str(sources / name) for name in BASELINE if str(sources / name) in files]
        flags = [*FLAGS, f"-I{sources}"]
        objects = []
        for place, file in enumerate(first):
            objects.append(str(Path(folder) / f"baseline{place}.o"))
            asked = f'-DLAYERSKIP_NEEDS="{needs(target)}"'
            problem = _run([*compiler, *flags, asked, "-c", file, "-o", objects[-1]])
            if problem is not None:
                return problem
        others = [file for file in files if file not in first]
        problem = _run([*compiler, *flags, "-shared", *target, *objects, *others, "-o", str(built)])
        if problem is not None:
            return problem
        built.replace(library)
    return None


def _run(command: Sequence[str]) -> str | None:
    """Run a compiler; returns what it says if it fails, else None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error}"
    return f"{shlex.join(command)}\n{done.stderr}" if done.returncode else None


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
                print(f"layerskip: {name} isn't built, and its processors run slower: {problem}", file=sys.stderr)
        if not built:
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["artifacts"].extend(built)


def _platform_tag() -> str:
    from packaging.tags import sys_tags

    return next(sys_tags()).platform
