"""Speed and memory of quantized weights, of quantized drafts, and of drafts among fewer tokens.

    python benchmarks/quantization.py --model 240m
    python benchmarks/quantization.py --model demo --prompts human_eval.jsonl

Each variant runs in its own process, so that its memory can be measured; processes alternate, and ratios are computed
within a turn. Memory is the difference that loading and decoding make to a process that has loaded a small model
already.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from arguments import DraftingArguments
from models import load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

import layerskip
from layerskip.checkpoint.checkpoint import open_checkpoint

WAYS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "drafts in int8": {"quantize_draft": "int8"},
    "drafts in int4": {"quantize_draft": "int4"},
    "drafts among a half of the tokens": {"draft_vocabulary": 0.5},
    "drafts in int8 among a half": {"quantize_draft": "int8", "draft_vocabulary": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    num_prompts: int = 3
    repetitions: int = 3
    worker: Annotated[str | None, tyro.conf.arg(metavar="WAY")] = None
    """Measure one variant and print JSON; the benchmark starts itself with this option."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    if arguments.worker is not None:
        print(json.dumps(work(arguments, WAYS[arguments.worker])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(arguments.model, Path(scratch), exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        turns = [
            {name: start(arguments, model, name) for name in WAYS} for _ in track(range(arguments.repetitions), "turns")
        ]
    report(arguments, turns)


def start(arguments: Arguments, model: str, way: str) -> dict[str, float]:
    """Measure one variant in a process of its own."""
    command = [sys.executable, __file__, "--worker", way, "--model", model]
    for name in ("exit_layer", "num_speculations", "max_new_tokens", "prompts", "num_prompts", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way}: {done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(arguments: Arguments, way: dict[str, Any]) -> dict[str, float]:
    """Speed and memory of one variant."""
    layerskip.load("demo").generate(["def"], max_new_tokens=8)  # imports all libraries
    before = resident_bytes()
    options = dict(way)
    if "draft_vocabulary" in options:
        options["draft_vocabulary"] = int(
            options["draft_vocabulary"] * open_checkpoint(arguments.model).config.vocab_size
        )
    lm = layerskip.load(arguments.model, dtype="float32", device="cpu", **options)
    prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
    drafting = {"exit_layer": arguments.exit_layer, "num_speculations": arguments.num_speculations}
    result: dict[str, float] = {}
    for name, strategy in (
        ("autoregressive", {"generation_strategy": "autoregressive"}),
        ("self-speculative", {"generation_strategy": "self_speculative", **drafting}),
    ):
        lm.generate(prompts[:1], max_new_tokens=8, **strategy)
        tokens, seconds, drafted, accepted = 0, 0.0, 0, 0
        for prompt in prompts:
            stats = lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, **strategy)[0].stats
            tokens += stats.tokens - 1
            seconds += stats.seconds - stats.time_to_first_token_s
            drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
        result[name] = tokens / seconds
        result["acceptance"] = accepted / max(drafted, 1)
    time.sleep(0.2)
    result["bytes"] = resident_bytes() - before
    return result


def resident_bytes() -> int:
    """Bytes of memory that belong to this process alone: pages of files, which the system may drop, aren't counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def report(arguments: Arguments, turns: list[dict[str, dict[str, float]]]) -> None:
    """Print a table and write the record."""
    plain = next(iter(WAYS))
    table = Table(title=f"{arguments.model}: exit {arguments.exit_layer}, {arguments.num_speculations} drafts")
    for column in ("weights", "autoregressive", "ratio", "self-speculative", "ratio", "accepted", "memory MB", "ratio"):
        table.add_column(column, justify="right")
    summary: dict[str, dict[str, float]] = {}
    for name in WAYS:
        row: dict[str, float] = {}
        for figure in ("autoregressive", "self-speculative", "bytes"):
            row[figure] = statistics.median(turn[name][figure] for turn in turns)
            row[f"{figure} ratio"] = statistics.median(turn[name][figure] / turn[plain][figure] for turn in turns)
        row["acceptance"] = turns[0][name]["acceptance"]
        summary[name] = row
        table.add_row(
            name,
            f"{row['autoregressive']:.1f}",
            f"{row['autoregressive ratio']:.2f}",
            f"{row['self-speculative']:.1f}",
            f"{row['self-speculative ratio']:.2f}",
            f"{row['acceptance']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['bytes ratio']:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    content = {"arguments": json.loads(json.dumps(asdict(arguments), default=str)), "turns": turns, "medians": summary}
    path = write_record(f"quantization-{Path(arguments.model).name}", content)
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
