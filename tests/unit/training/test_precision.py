"""When training computes in bfloat16."""

import platform
from pathlib import Path

import pytest
import torch

from layerskip.training.precision import MIN_CPU_WIDTH, choose_precision, cpu_bfloat16

CPUINFO = Path("/proc/cpuinfo")
WIDE = MIN_CPU_WIDTH


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without an accelerator, whose CPU has no bfloat16 until the test says otherwise."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.skipif(not CPUINFO.is_file() or platform.machine() != "x86_64", reason="Linux on x86 says what it has")
def test_what_this_cpu_has() -> None:
    """As the operating system says."""
    flags = set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split())
    expected = "AMX" if "amx_tile" in flags else "AVX512_BF16" if "avx512_bf16" in flags else None
    assert cpu_bfloat16() == expected


@pytest.mark.parametrize(
    ("test", "name"), [("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512_BF16")]
)
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN takes no bfloat16 here")
def test_a_cpu_with_bfloat16(cpu: pytest.MonkeyPatch, test: str, name: str) -> None:
    cpu.setattr(torch.cpu, test, lambda: True)
    assert choose_precision("auto", WIDE) == ("bfloat16", f"the CPU has {name}")
    precision, why = choose_precision("auto", WIDE - 1)
    assert (precision, why) == ("float32", f"at a width of {WIDE - 1}, {name} gains nothing")
    assert choose_precision("float32", WIDE)[0] == "float32"
    assert choose_precision("bfloat16", 8)[0] == "bfloat16"


def test_a_cpu_without(cpu: pytest.MonkeyPatch) -> None:
    assert choose_precision("auto", WIDE) == ("float32", "the CPU has no instructions for bfloat16")
    cpu.delattr(torch.cpu, "_is_amx_tile_supported")
    cpu.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert choose_precision("auto", WIDE)[0] == "float32"
    assert choose_precision("bfloat16", WIDE)[0] == "bfloat16"


@pytest.mark.parametrize(("own", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_gpus_that_only_emulate_do_not_count(cpu: pytest.MonkeyPatch, own: bool, expected: str) -> None:
    cpu.setattr(torch.cuda, "is_available", lambda: True)
    cpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    assert choose_precision("auto", 8)[0] == expected
