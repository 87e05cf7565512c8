"""Time of products with few rows by kernel and layout of the weight; `model/torch/linear.py` chooses by it.

    python benchmarks/linear_layouts.py --widths 192 1024 4096

For each shape, enough different weights to exceed the caches are multiplied in turn, all kernels interleaved. The
results are medians, relative to torch's stock product of one row.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from layerskip.model.torch.linear import DenseLinear, OneDNNLinear, pack

WAYS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "stock": DenseLinear,
    "oneDNN": OneDNNLinear,
    "oneDNN, packed": lambda weight: OneDNNLinear(pack(weight)),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    widths: tuple[int, ...] = (192, 384, 768, 1024, 2048, 4096)
    """Input widths; each is measured with an output as wide and one four times as wide."""
    rows: tuple[int, ...] = (1, 3, 5, 7, 9)
    megabytes: int = 150
    """Megabytes of all weights of one shape; more than the caches hold."""
    repetitions: int = 7
    threads: int = 2


@torch.inference_mode()
def measure(arguments: Arguments, outer: int, inner: int) -> dict[str, dict[int, float]]:
    """Microseconds of a product, by kernel and number of rows."""
    count = max(2, arguments.megabytes * 2**20 // (outer * inner * 4))
    weights = [torch.randn(outer, inner) for _ in range(count)]
    linears = {name: [make(weight) for weight in weights] for name, make in WAYS.items()}
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(arguments.repetitions):
        for rows in arguments.rows:
            x = torch.randn(1, rows, inner)
            for name, group in linears.items():
                start = time.perf_counter()
                for linear in group:
                    linear(x)
                seconds[name, rows].append((time.perf_counter() - start) / count)
    return {name: {rows: statistics.median(seconds[name, rows]) * 1e6 for rows in arguments.rows} for name in WAYS}


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    console = Console()
    table = Table(title="time relative to one row through F.linear")
    for column in ("weight", "way", *(f"{rows} rows" for rows in arguments.rows)):
        table.add_column(column, justify="left" if column in ("weight", "way") else "right")
    records = []
    for inner in arguments.widths:
        for outer in (inner, 4 * inner):
            times = measure(arguments, outer, inner)
            unit = times["stock"][arguments.rows[0]]
            for name in WAYS:
                cells = (f"{times[name][rows] / unit:.2f}" for rows in arguments.rows)
                table.add_row(f"{outer} x {inner}" if name == "stock" else "", name, *cells)
            records.append({"outer": outer, "inner": inner, "microseconds": times})
    console.print(table)
    path = write_record("linear_layouts", {"shapes": records})
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
