"""Checks and measures everything that needs a GPU, in twelve minutes and without a network.

    make gpu                                              # or: python benchmarks/on_gpu.py
    make gpu WHEELS=wheels ARGS="--output runs/h100"      # packages that the machine lacks come from a folder of wheels
    make gpu ARGS="--device cpu"                          # all steps, small: how this script is tested
    make gpu ARGS="--steps 1,3"                           # some; --list shows them

Runs from a checkout, with the packages of the Python that runs it. Each step is a process with its own time limit, at
which the process and everything that it started are killed. The results go into `record.jsonl` as soon as a step ends,
and its output into a log beside that. The last line says what failed; the exit code is 1 if anything did.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS_FILE = Path(__file__).with_name("gpu_steps.py")
BASE = ("torch", "transformers", "safetensors", "huggingface_hub")
LIMIT_S = 720.0
"""Seconds for all steps together."""
GRACE_S = 3.0
"""Seconds between Ctrl-C, after which pytest still reports its failures, and the kill."""
RECORD = "record.jsonl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step, run as a process."""

    name: str
    what: str
    """Description for people."""
    limit_s: float
    needs: tuple[str, ...] = ()
    """Modules that the step needs."""
    command: tuple[str, ...] = ()
    """Command to run, to which the path of the result file is added; `gpu_steps.py` if not given."""


STEPS = (
    Step(name="environment", what="machine, versions, what is missing; compiles native/", limit_s=45, needs=("torch",)),
    Step(name="tests", what="the tests marked gpu", limit_s=200, needs=(*BASE, "pytest")),
    Step(name="parity", what="logits against transformers in float32 and bfloat16", limit_s=50, needs=BASE),
    Step(name="verify", what="speculation against plain text, greedy and coupled", limit_s=100, needs=BASE),
    Step(name="graphs", what="costs of replays, speed with and without graphs, sampling", limit_s=120, needs=BASE),
    Step(name="engine", what="tokens/s over bandwidth in bfloat16, 240m and 1b", limit_s=110, needs=(*BASE, "rich")),
    Step(name="training", what="a minute of the recipe in bfloat16", limit_s=75, needs=(*BASE, "accelerate")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a step: a line of the record."""

    step: str
    status: str
    """passed, failed or skipped."""
    reason: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    limit_s: float = 0.0
    log: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    """Results of the step, as far as it got."""


def run_steps(
    steps: Sequence[Step],
    output: Path,
    *,
    environment: Mapping[str, str],
    arguments: Sequence[str] = (),
    limit_s: float = LIMIT_S,
) -> list[Outcome]:
    """Run steps one after the other, writing the record as they end.

    Args:
        steps: Steps to run.
        output: Folder for the record and the logs; an earlier record is overwritten.
        environment: Environment of the processes.
        arguments: Arguments of each step, after its name.
        limit_s: Seconds for all steps; steps without any time left are skipped.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).write_text("")
    deadline = time.monotonic() + limit_s
    outcomes = []
    for number, step in enumerate(steps):
        left = min(step.limit_s, deadline - time.monotonic())
        missing = [name for name in step.needs if is_missing(name)]
        if missing:
            outcome = Outcome(step=step.name, status="skipped", reason=" and ".join(missing) + _is_or_are(missing))
        elif left < 1:
            outcome = Outcome(step=step.name, status="skipped", reason=f"the {limit_s:.0f} seconds for all are over")
        else:
            print(f"{step.name}: {step.what} (at most {left:.0f} s) ...", flush=True)
            outcome = run_step(step, output / f"{number}-{step.name}.log", environment, arguments, left)
        outcomes.append(outcome)
        with (output / RECORD).open("a") as record:
            record.write(json.dumps(vars(outcome)) + "\n")
        print(describe(outcome), flush=True)
    return outcomes


def run_step(
    step: Step, log: Path, environment: Mapping[str, str], arguments: Sequence[str], limit_s: float
) -> Outcome:
    """Run one step to its end or its limit."""
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as stream:
        result = Path(scratch) / "result.json"
        command = step.command or (sys.executable, str(STEPS_FILE), step.name, *arguments, "--limit", f"{limit_s:.0f}")
        before, started = _children_seconds(), time.monotonic()
        process = subprocess.Popen(
            [*command, str(result)],
            cwd=ROOT,
            env={**environment, "TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
            reason = None
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit_s:.0f} s"
            with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(GRACE_S)
        finally:  # kills also what an ended step has left running; also on Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(result.read_text())
    problems = found.pop("problems", [])
    if reason is None and process.returncode not in (0, 1 if problems else 0):  # 1: the step itself lists the problems
        reason = f"exit code {process.returncode}"
    problems = problems if reason is None else [reason, *problems]
    return Outcome(
        step=step.name,
        status="failed" if problems else "passed",
        reason="; ".join(problems) or None,
        seconds=round(time.monotonic() - started, 2),
        cpu_seconds=round(_children_seconds() - before, 2),
        limit_s=round(limit_s, 1),
        log=log.name,
        result=found,
    )


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.status == "skipped":
        return f"{outcome.step}: skipped: {outcome.reason}"
    took = f"{outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of the processors"
    what = f": {outcome.reason}; see {outcome.log}" if outcome.reason else ""
    headline = outcome.result.get("headline")
    return f"{outcome.step}: {outcome.status} ({took}){what}" + (f"; {headline}" if headline else "")


def last_line(outcomes: Sequence[Outcome]) -> str:
    """The failures, and the steps that were not run."""
    failed = [outcome.step for outcome in outcomes if outcome.status == "failed"]
    skipped = [outcome.step for outcome in outcomes if outcome.status == "skipped"]
    counts = f"{len(outcomes) - len(failed) - len(skipped)} of {len(outcomes)} steps passed"
    parts = [f"FAILED: {', '.join(failed)}"] if failed else []
    parts += [f"skipped: {', '.join(skipped)}"] if skipped else []
    return "; ".join([*parts, counts])


def is_missing(module: str) -> bool:
    """Whether a module can't be imported here."""
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def install_wheels(folder: Path, site: Path) -> str | None:
    """Unpack the wheels of packages that this Python lacks; returns the problems."""
    wheels = [path for path in sorted(folder.glob("*.whl")) if not _is_installed(path.name.split("-")[0])]
    if not folder.is_dir():
        return f"{folder} is no folder"
    if wheels:
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stderr.strip() or f"pip ended with exit code {done.returncode}"
    return None


def choose(names: str | None) -> list[Step]:
    """The steps of a list of numbers and names; raises `ValueError`."""
    if names is None:
        return list(STEPS)
    by_name = {key: step for i, step in enumerate(STEPS) for key in (str(i), step.name)}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise ValueError(
            f"--steps: {unknown[0]!r} is no step; steps are 0 to {len(STEPS) - 1}, or their names (--list)"
        )
    return [step for step in STEPS if step in {by_name[name] for name in wanted}]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, prog="on_gpu.py"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", help="numbers or names, with commas between; all if not given")
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"))
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that are missing")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all steps together")
    options = parser.parse_args(argv)
    try:
        steps = choose(options.steps)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for i, step in enumerate(STEPS):
            print(f"{i}  {step.name:<12} {step.limit_s:>4.0f} s  {step.what}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        if options.wheels is not None and (problem := install_wheels(options.wheels, site)) is not None:
            print(f"wheels: {problem}", flush=True)
        sys.path.append(str(site))  # `needs` are looked for there too
        outcomes = run_steps(
            steps,
            options.output,
            environment=_environment(site, Path(scratch)),
            arguments=("--device", options.device),
            limit_s=options.limit,
        )
    print(f"record: {options.output / RECORD}")
    print(last_line(outcomes), flush=True)
    return int(any(outcome.status == "failed" for outcome in outcomes) or all(o.status == "skipped" for o in outcomes))


def _environment(site: Path, scratch: Path) -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", ""), str(site)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",  # so that the log of a killed step is complete
        "LAYERSKIP_CACHE": str(scratch / "cache"),  # independent of earlier and later runs
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _children_seconds() -> float:
    """Processor time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _is_or_are(names: Sequence[str]) -> str:
    return " is missing" if len(names) == 1 else " are missing"


if __name__ == "__main__":
    raise SystemExit(main())
