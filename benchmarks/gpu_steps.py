"""The steps of `on_gpu.py`, each run as `python gpu_steps.py NAME --device DEVICE --limit SECONDS RESULT`.

RESULT is a JSON file that is rewritten after every result, so that a step that is killed leaves its results so far.
`problems` lists the failures; `headline` is for people. On a CPU everything is as small as possible.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_graphs import graphs
from gpu_models import engine, parity, training, verify

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # hatch_build

SLOW_TESTS_S, GRACE_S = 20, 5
"""Seconds that must be left to begin tests that compile for minutes, and seconds that are left when they are
stopped."""


@dataclass(kw_only=True)
class Report:
    """Results of a step so far."""

    path: Path
    device: str
    limit_s: float
    started: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=lambda: {"problems": []})

    @property
    def small(self) -> bool:
        """Whether this is a CPU."""
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        """Seconds until the step is killed."""
        return self.limit_s - (time.monotonic() - self.started)

    def keep(self, **figures: Any) -> None:
        """Add figures, print them and write all."""
        self.found.update(figures)
        print(json.dumps(figures), flush=True)
        self.write()

    def problem(self, what: str) -> None:
        """Add a failure."""
        self.found["problems"].append(what)
        print(f"PROBLEM: {what}", flush=True)
        self.write()

    def check(self, holds: bool, what: str) -> None:
        """Add a problem unless a condition is true."""
        if not holds:
            self.problem(what)

    def write(self) -> None:
        """Write the results so far atomically, because the process may be killed at any time."""
        staging = self.path.with_suffix(".new")
        staging.write_text(json.dumps(self.found))
        staging.replace(self.path)


def environment(report: Report) -> None:
    """Report the machine and versions; compile native/ for the checkout."""
    import torch

    from layerskip.machine import describe_machine

    if not report.small:
        properties = torch.cuda.get_device_properties(0)
        report.keep(
            gpu=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            memory_gib=round(properties.total_memory / 2**30, 1),
            driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    report.keep(**describe_machine())
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*requirements["dependencies"], *requirements["optional-dependencies"]["train"], "pytest>=9.0", "triton"]
    versions = {name: _version(name) for name in (re.match(r"[\w-]+", line)[0] for line in wanted)}  # type: ignore[index]
    missing = [name for name, found in versions.items() if found is None]
    report.keep(packages=versions, missing=missing, native=_compile())
    gpu = report.found["gpu"] or report.found["cpu"]
    lacks = f", without {', '.join(missing)}" if missing else ""
    report.keep(headline=f"{gpu}, torch {versions['torch']}, transformers {versions['transformers']}{lacks}")


def _compile() -> str:
    from hatch_build import compile_libraries, targets

    folder, sources = ROOT / "src" / "layerskip", sorted((ROOT / "native").rglob("*.*"))
    libraries, newest = [folder / name for name in targets()], max(source.stat().st_mtime for source in sources)
    if all(library.exists() and library.stat().st_mtime >= newest for library in libraries):
        return "compiled before"
    problems = compile_libraries(ROOT / "native", folder)
    return "; ".join(problem for problem in problems.values() if problem is not None) or "compiled"


def tests(report: Report) -> None:
    """Run all tests for a GPU; tests that compile for minutes come last and may be stopped when the time is over."""
    outcomes: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    codes = [_run_tests(report, "gpu and not slow", outcomes, report.limit_s)]
    report.check(bool(outcomes["PASSED"]), "no test passed")
    if not report.small and codes[0] == 0 and report.left_s > SLOW_TESTS_S:
        codes.append(_run_tests(report, "gpu and slow", outcomes, report.left_s - GRACE_S))
        report.keep(slow_tests="stopped" if codes[1] is None else "ended")
    report.keep(**_counts(outcomes))
    for name in (*outcomes["FAILED"], *outcomes["ERROR"]):
        report.problem(name)
    for code in codes:
        report.check(code in (0, None) or bool(report.found["problems"]), f"pytest ended with exit code {code}")


def _run_tests(report: Report, marked: str, outcomes: dict[str, list[str]], limit_s: float) -> int | None:
    """Run pytest with the outcome of each test as it ends; returns its exit code, None if it was stopped."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", marked, "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "minversion=7.0", "--durations=5"]  # an older pytest than the one for development works too
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "LAYERSKIP_TEST_DEVICE": report.device},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
            outcomes[found[2]].append(found[1])
            report.found.update(_counts(outcomes))
            report.write()
    timer.cancel()
    code = process.wait()
    return None if stopped.is_set() else code


def _counts(outcomes: Mapping[str, list[str]]) -> dict[str, Any]:
    counts = {name.lower(): len(tests) for name, tests in outcomes.items()}
    return {**counts, "headline": ", ".join(f"{number} {name}" for name, number in counts.items() if number)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


RUN: dict[str, Callable[[Report], None]] = {
    step.__name__: step for step in (environment, tests, parity, verify, graphs, engine, training)
}


def main() -> int:
    """Run a step."""
    parser = argparse.ArgumentParser(prog="gpu_steps.py")
    parser.add_argument("step", choices=RUN)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # at its limit, a step may still write its results
    report = Report(path=options.result, device=options.device, limit_s=options.limit)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            report.problem(f"there is no CUDA device that torch {torch.__version__} can use")
            return 1
    try:
        RUN[options.step](report)
    except KeyboardInterrupt:  # its limit, which `on_gpu.py` reports
        traceback.print_exc()
        return 1
    except Exception as error:  # whatever a GPU raises belongs into the record
        traceback.print_exc()
        report.problem(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": "))
    return int(bool(report.found["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
