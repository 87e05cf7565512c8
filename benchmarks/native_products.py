"""Time of the native kernels' products by format of the weight: what verifying several tokens or a prompt costs.

    python benchmarks/native_products.py
    LAYERSKIP_CPU=avx2 python benchmarks/native_products.py --formats q4_1 q4_1:int8 --threads 1

Each pass multiplies with other weights, more than the caches hold, in the shapes of SmolLM2 135M. Formats and numbers
of rows are interleaved, and the fastest pass of each counts, so that other processes disturb less.
"""

import time
from dataclasses import dataclass

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table

from layerskip.model.blocks import BLOCK_BYTES, BlockWeight, block_weights
from layerskip.model.native.linear import NativeLinear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Outputs and inputs of a layer's weights; as many inputs more as make whole blocks."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    formats: tuple[str, ...] = (
        *("q4_1", "q4_0", "int4", "q8_0", "int8", "bfloat16", "float32"),
        *("q4_1:int8", "q8_0:int8", "bfloat16:bfloat16"),
    )
    """Formats of the weights; behind a colon what inputs are rounded to (`compute`), if they are."""
    rows: tuple[int, ...] = (1, 2, 3, 5, 9, 16, 64)
    layers: int = 30
    repetitions: int = 15
    threads: int = 2


def make(name: str, outputs: int, inputs: int) -> NativeLinear:
    """A random weight of a format, and how it is multiplied (`Arguments.formats`)."""
    storage, _, rounded = name.partition(":")
    compute = rounded or "float32"
    if storage not in BLOCK_BYTES:
        return NativeLinear(torch.randn(outputs, inputs), storage=storage, compute=compute)
    size, weights = BLOCK_BYTES[storage], block_weights(storage)  # type: ignore[index,arg-type]
    number = -(-inputs // weights)
    blocks = torch.randint(0, 256, (outputs, number, size), dtype=torch.uint8)
    halves = 2 if storage in ("q4_1", "q5_1", "q4_k", "q5_k") else 1  # scale, and minimum
    start = size - 2 if storage == "q6_k" else 0
    blocks[..., start : start + 2 * halves] = torch.rand(outputs, number, halves).half().view(torch.uint8)
    return NativeLinear(BlockWeight(storage, blocks.flatten(1)), compute=compute)  # type: ignore[arg-type]


def measure(arguments: Arguments) -> tuple[dict[str, list[NativeLinear]], dict[str, dict[int, float]]]:
    """The weights of each format, and the seconds of a pass through them by number of rows."""
    weights = {
        name: [make(name, *shape) for _ in range(arguments.layers) for shape in SHAPES] for name in arguments.formats
    }
    seconds = {name: dict.fromkeys(arguments.rows, float("inf")) for name in arguments.formats}
    for _ in range(arguments.repetitions):
        for rows in arguments.rows:
            for name, linears in weights.items():
                inputs = {linear.view.inputs: torch.randn(rows, linear.view.inputs) for linear in linears}
                start = time.perf_counter()
                for linear in linears:
                    linear(inputs[linear.view.inputs])
                seconds[name][rows] = min(seconds[name][rows], time.perf_counter() - start)
    return weights, seconds


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    weights, seconds = measure(arguments)
    table = Table(title="milliseconds of a pass, and relative to the first column")
    for column in ("format", "MB", "GB/s", *(f"{rows} rows" for rows in arguments.rows)):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, times in seconds.items():
        num_bytes, first = sum(linear.num_bytes for linear in weights[name]), times[arguments.rows[0]]
        cells = (f"{1e3 * time_:.2f} ({time_ / first:.2f})" for time_ in times.values())
        table.add_row(name, f"{num_bytes / 1e6:.0f}", f"{num_bytes / first / 1e9:.1f}", *cells)
    console = Console()
    console.print(table)
    path = write_record("native_products", {"seconds": seconds})
    machine = environment()
    console.print(f"{machine['cpu']}, {machine['kernels']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
