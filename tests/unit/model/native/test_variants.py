"""One library for each instruction set: what is asked of them before they are used, and how one is insisted on."""

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.model.native.library import LIBRARIES, find_variants, target_of
from layerskip.model.native.variants import Choice, Variant, outdated_text, pick

ROOT = Path(__file__).parents[4]
PRESENT = [path for path in LIBRARIES if path.exists()]
USABLE = [variant.target for variant in find_variants() if variant.library is not None]
needs_libraries = pytest.mark.skipif(not PRESENT, reason="the compiled kernels weren't built")
needs_two = pytest.mark.skipif(len(USABLE) < 2, reason="this processor runs one library")
ASKED_FIRST = ("layerskip_target", "layerskip_runs_here", "layerskip_missing", "layerskip_interface")
HELPERS = {"syscall", "__stack_chk_fail", "getauxval", "memcpy"}
"""Functions of the system that these may call."""
ASK = """
#include <dlfcn.h>
#include <cstdio>
int main(int count, char** files) {
    for (int i = 1; i < count; ++i) {
        void* library = dlopen(files[i], RTLD_NOW);
        if (library == nullptr) return std::puts(dlerror());
        const auto call = [&](const char* name) { return dlsym(library, name); };
        std::printf("%s %d %s\\n", reinterpret_cast<const char* (*)()>(call("layerskip_target"))(),
                    reinterpret_cast<int (*)()>(call("layerskip_runs_here"))(),
                    reinterpret_cast<const char* (*)()>(call("layerskip_missing"))());
    }
}
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, since a process uses one library."""
    own = {name: value for name, value in os.environ.items() if name != "LAYERSKIP_CPU"}
    own["PYTHONPATH"] = str(ROOT / "src")
    return subprocess.run(
        [sys.executable, "-c", code], env={**own, **environment}, capture_output=True, text=True, check=False
    )


@functools.cache
def disassembled(path: Path) -> dict[str, str]:
    """Instructions of each function of a library."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.split(r"^[0-9a-f]+ <(\S+)>:$", text, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


@needs_libraries
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize("path", PRESENT, ids=[path.stem for path in PRESENT])
def test_what_is_asked_first_needs_no_instruction_set(path: Path) -> None:
    """Neither what is called before the processor is known to suit, nor what it calls, nor what loading runs."""
    functions = disassembled(path)
    inner = re.compile(r"_ZN9layerskip(6target|9runs_here|7missing)Ev")
    asked = [name for name in functions if name in ASKED_FIRST or inner.fullmatch(name)]
    assert set(ASKED_FIRST) <= set(asked)
    assert len(asked) == len(ASKED_FIRST) + 3
    for name in asked:
        # VEX and EVEX encodings are those whose names begin with v; masks and wide registers belong to them.
        assert not re.search(r"\t(v\w+|k(mov|or|and|xor)\w+|tile\w+)\b|%[yz]mm|%k[0-7]|%tmm", functions[name]), name
        called = set(re.findall(r"(?:call|jmp|bl?)\s+[0-9a-f]+ <([^>@+]+)", functions[name]))
        assert called - {name} <= {*asked, *HELPERS}, name
    sections = subprocess.run(["objdump", "-h", str(path)], capture_output=True, text=True, check=True).stdout
    started = re.search(r"\.init_array\s+([0-9a-f]+)", sections)
    assert started is None or int(started[1], 16) == 8, "something else than the runtime's own start is run at loading"


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
@pytest.mark.skipif("avx512bf16" not in {path.stem.removeprefix("_native_") for path in PRESENT}, reason="not built")
@pytest.mark.parametrize(("processor", "usable"), [("Nehalem", set()), ("SandyBridge", set()), ("Haswell", {"avx2"})])
def test_other_processors_are_told_apart(processor: str, usable: set[str], tmp_path: Path) -> None:
    """On an emulated processor without an instruction set, asking says so, and doesn't run into it."""
    program = tmp_path / "ask"
    (tmp_path / "ask.cpp").write_text(ASK)
    compiler = runpy.run_path(str(ROOT / "hatch_build.py"))["find_compiler"]()
    subprocess.run([*compiler, str(tmp_path / "ask.cpp"), "-o", str(program), "-ldl"], check=True)
    command = ["qemu-x86_64", "-cpu", processor, str(program), *map(str, PRESENT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {line.split(" ")[0]: line.split(" ")[1:] for line in done.stdout.splitlines()}
    assert len(found) == len(PRESENT)
    assert {target for target, (runs, *_) in found.items() if runs == "1"} == usable
    for target, (runs, *missing) in found.items():
        assert (runs == "1") == (missing == [""]), target
        assert usable or "avx2" in missing


def test_one_is_picked_by_name_or_by_rank() -> None:
    library = object()
    variants = [
        Variant(path=Path("a"), target="avx512", problem="needs avx512f, which this processor or system lacks"),
        Variant(path=Path("b"), target="avx2", library=library),  # type: ignore[arg-type]
        Variant(path=Path("c"), target="generic", library=library),  # type: ignore[arg-type]
    ]
    for wanted, target in ((None, "avx2"), ("generic", "generic")):
        found = pick(variants, wanted, "LAYERSKIP_CPU")
        assert found is not None
        assert found.target == target
    assert pick(variants[:1], None, "LAYERSKIP_CPU") is None
    for wanted, reason in (("avx512", "needs avx512f, which this processor or system lacks"), ("avx9", "isn't known")):
        with pytest.raises(InvalidArgumentError) as raised:
            pick(variants, wanted, "kernels 'native:x'")
        assert str(raised.value) == (
            f"the kernels for {wanted!r} (kernels 'native:x') can't be used: that library {reason}; those that can run "
            "here: avx2, generic"
        )
    assert outdated_text(variants) is None


def test_a_process_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSKIP_CPU", raising=False)
    choice = Choice()
    choice.check("avx2")
    choice.settled = "avx512"
    choice.check("avx512")
    with pytest.raises(InvalidArgumentError, match=r"'native:avx2' can't be used in this process.* 'avx512': .*=avx2$"):
        choice.check("avx2")
    monkeypatch.setenv("LAYERSKIP_CPU", "avx512")
    with pytest.raises(InvalidArgumentError, match=r"LAYERSKIP_CPU=avx512 contradict each other"):
        Choice().check("avx2")


@needs_two
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_model_runs_with_the_one_that_is_asked_for(by: str) -> None:
    """Products, packing, sampling and networks all take the same library."""
    target = USABLE[-1]
    code = f"""
import layerskip, sys
from layerskip.errors import InvalidArgumentError
from layerskip.model.native.library import load_library, target_of
lm = layerskip.load("demo", kernels={f"native:{target}" if by == "option" else "native"!r})
used = target_of(load_library())
print(used, lm.decoder.kernels)
print(len(lm.generate("def", max_new_tokens=4)) > 0)
layerskip.load("demo", kernels="native:{target}")
try:
    layerskip.load("demo", kernels="native:{USABLE[0]}")
except InvalidArgumentError as error:
    print(error)
"""
    done = python(code, **({"LAYERSKIP_CPU": target} if by == "environment" else {}))
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{target} native", "True"], done.stderr
    assert len(lines) == 3
    assert "contradict" in lines[2] if by == "environment" else f"runs those for {target!r}" in lines[2]
    assert done.stderr == ""


@needs_libraries
@pytest.mark.parametrize("asked", ["native:avx3", "native:amx"])
def test_one_that_does_not_exist_is_refused_in_a_line(asked: str) -> None:
    target = asked.partition(":")[2]
    if target in USABLE:
        pytest.skip("it does exist here")
    command = [sys.executable, "-m", "layerskip", "generate", "--prompt", "a", "--kernels", asked]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip().endswith("run here: " + ", ".join(USABLE))
    assert asked in done.stderr


@needs_two
def test_the_best_is_taken() -> None:
    code = "from layerskip.model.native.library import *; print(target_of(load_library()))"
    assert python(code).stdout == f"{USABLE[0]}\n"
    assert target_of(next(v.library for v in find_variants() if v.library is not None)) == USABLE[0]
