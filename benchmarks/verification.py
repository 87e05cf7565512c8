"""What verifying several tokens costs: a pass of all layers over 1, 2, 3, 5 and 9 tokens of one row.

    python benchmarks/verification.py --model smollm2 --compute float32 int8
    python benchmarks/verification.py --model 240m --quantize int4 --compute float32 int8
    LAYERSKIP_CPU=avx2 python benchmarks/verification.py --model demo

Self-speculation gains where a pass over several tokens takes little longer than one over a single token. Every
repetition goes through all numbers of tokens in turn, and ratios are taken within it, so that other work on the machine
disturbs them alike. A pass includes the head, and choosing a token after each.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from models import LARGE, ModelName, prepare
from peers import Spread
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.decoding.adaptive.call_timer import CallTimer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: ModelName = "smollm2"
    quantize: Literal["int8", "int4"] | None = None
    """As for `layerskip.load`."""
    compute: Sequence[Literal["float32", "int8", "bfloat16"]] = ("float32",)
    """How products are computed, one after the other: values of the option of `layerskip.load`."""
    tokens: Sequence[int] = (1, 2, 3, 5, 9)
    """Numbers of tokens in a pass; ratios are to the first."""
    context: int = 128
    """Tokens of the row before them."""
    repetitions: int = 30
    threads: int = 2
    json: bool = False
    """Print the record, and nothing else."""


def measure(lm: layerskip.LanguageModel, arguments: Arguments) -> list[list[float]]:
    """Seconds of a pass, by repetition and number of tokens; a first repetition warms up and isn't among them."""
    timer = CallTimer(lm.decoder, 1, max(arguments.tokens), arguments.context)
    with lm.decoder.own_threads():
        rounds = [
            [timer.seconds(0, lm.decoder.num_layers, count, repetitions=2) for count in arguments.tokens]
            for _ in range(arguments.repetitions + 1)
        ]
    return rounds[1:]


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if arguments.model in LARGE else torch.float32
        name = prepare(arguments.model, Path(folder), dtype=dtype)
        for compute in arguments.compute:
            lm = layerskip.load(name, compute=compute, quantize=arguments.quantize, threads=arguments.threads)
            found[compute] = measure(lm, arguments)
    table = Table("products in", *(f"{count} tokens" for count in arguments.tokens))
    content: dict[str, object] = {"arguments": json.loads(json.dumps(asdict(arguments))), "ways": {}}
    for compute, rounds in found.items():
        seconds = [Spread.of(column) for column in zip(*rounds, strict=True)]
        ratios = [Spread.of(column) for column in zip(*([s / r[0] for s in r] for r in rounds), strict=True)]
        content["ways"][compute] = {"seconds": list(map(asdict, seconds)), "ratios": list(map(asdict, ratios))}  # type: ignore[index]
        cells = [f"{1e3 * s.median:.2f} ms ({r.median:.2f})" for s, r in zip(seconds, ratios, strict=True)]
        table.add_row(compute, *cells)
    path = write_record(f"verification-{Path(arguments.model).stem}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
        return
    console = Console()
    console.print(table)
    console.print(f"{arguments.model}: medians, and ratios within a repetition; {processor()}; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
