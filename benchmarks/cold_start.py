"""How long a command takes from nothing, beside `import torch`, which no command can do without.

    python benchmarks/cold_start.py                     # generate and load with the embedded model
    python benchmarks/cold_start.py --repetitions 15    # on a machine that does other work as well

Processes run one after another: `import torch`, each command, and again. What counts is the median of the differences
within a repetition, in wall time; processor time says what that would be on a machine that does nothing else.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from record import write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

TORCH = "import torch"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "demo"
    prompt: str = "def f("
    max_new_tokens: int = 8
    repetitions: int = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a process took."""

    wall_s: float
    cpu_s: float
    """User and system, all threads."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    for argv in commands(arguments).values():
        run(argv)  # files are in memory, and costs of steps in their cache, as for all but the first command of a day
    for _ in track(range(arguments.repetitions), "repetitions"):
        for name, argv in commands(arguments).items():
            costs[name].append(run(argv))
    rows = [summarise(name, costs[name], costs[TORCH]) for name in costs]
    show(rows)
    path = write_record("cold-start", {"arguments": asdict(arguments), "commands": rows})
    print(path)


def commands(arguments: Arguments) -> dict[str, list[str]]:
    """What is run, by name."""
    python = [sys.executable, "-c"]
    options = ["--model", arguments.model, "--max-new-tokens", str(arguments.max_new_tokens)]
    return {
        TORCH: [*python, TORCH],
        "layerskip generate": [sys.executable, "-m", "layerskip", "generate", "--prompt", arguments.prompt, *options],
        "layerskip.load": [*python, f"import layerskip; layerskip.load({arguments.model!r})"],
    }


def run(argv: list[str]) -> Cost:
    """Run a process to its end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(wall_s=wall, cpu_s=cpu)


def summarise(name: str, costs: list[Cost], torch_costs: list[Cost]) -> dict[str, Any]:
    """Medians, and those of what a command takes more than `import torch` just before it."""
    pairs = list(zip(costs, torch_costs, strict=True))
    return {
        "name": name,
        "wall_s": statistics.median(cost.wall_s for cost in costs),
        "cpu_s": statistics.median(cost.cpu_s for cost in costs),
        "more_wall_s": statistics.median(cost.wall_s - torch.wall_s for cost, torch in pairs),
        "more_cpu_s": statistics.median(cost.cpu_s - torch.cpu_s for cost, torch in pairs),
        "runs": [asdict(cost) for cost in costs],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table of the medians."""
    table = Table("", "s", "s of processors", f"s more than {TORCH}", "s of processors more")
    for row in rows:
        table.add_row(row["name"], *(f"{row[key]:.2f}" for key in ("wall_s", "cpu_s", "more_wall_s", "more_cpu_s")))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
