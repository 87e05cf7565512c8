"""The record that every benchmark writes: its numbers with machine, versions and commit."""

import json
import time
from pathlib import Path
from typing import Any

from layerskip.machine import describe_machine
from layerskip.model.native.library import load_library, target_of

__all__ = ["environment", "processor", "write_record"]

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions, commit, and the instruction set of the compiled kernels."""
    library = load_library()
    return {**describe_machine(), "kernels": None if library is None else target_of(library)}


def processor() -> str:
    """The processor and the kernels for it, in words: without kernels, numbers are those of torch."""
    found = environment()
    return f"{found['cpu']}, {found['kernels'] or 'NO'} kernels"


def write_record(name: str, content: dict[str, Any]) -> Path:
    """Write one run as JSON below `benchmarks/results` and return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"environment": environment(), **content}, indent=2) + "\n")
    return path
