"""What loading a model was planned to need of memory, beside what processes were measured to need.

    python benchmarks/memory.py
    python benchmarks/memory.py --models smollm2 --json

Each way to load runs in a process of its own that has loaded a small model of the same kind before, so that libraries
aren't counted. Measured: memory after loading and at the worst moment of it, pages of mapped files included, and the
same after a prompt as long as a chunk. Needs Linux's /proc.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table
from synthetic import SHAPES, make_untrained

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import MemoryPlan, plan_memory
from layerskip.checkpoint.loading.plan import choose_plan
from layerskip.decoding.rounds.plain import PREFILL_CHUNK
from layerskip.model.native.library import load_library
from layerskip.model.native.memory import return_freed_memory

WAYS: dict[str, dict[str, Any]] = {
    "native": {},
    "native int8": {"quantize": "int8"},
    "native int4": {"quantize": "int4"},
    "native, drafts in int8": {"quantize_draft": "int8"},
    "torch": {"kernels": "torch"},
    "torch bfloat16": {"kernels": "torch", "dtype": "bfloat16"},
    "torch int8": {"kernels": "torch", "quantize": "int8"},
}
CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    models: tuple[str, ...] = ("smollm2", "240m", "240m-q8_0", "240m-q4_0")
    """Names, folders or GGUF files; a shape of `synthetic.py`, also with a type of GGUF files behind it."""
    ways: tuple[str, ...] = tuple(WAYS)
    threads: int = 2
    json: bool = False
    """Print JSON instead of a table."""
    worker: Annotated[str | None, tyro.conf.arg(metavar="WAY")] = None
    """Measure one way and print JSON; the benchmark starts itself with this option."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    if arguments.worker is not None:
        print(json.dumps(work(arguments.models[0], WAYS[arguments.worker], warm_up=arguments.models[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        small = prepare("tiny", Path(scratch))
        rows = []
        for name in arguments.models:
            path = prepare(name, Path(scratch))
            for way in arguments.ways:
                if "native" in way and load_library() is None:
                    continue
                planned = plan_of(path, WAYS[way])
                rows.append(row(name, way, planned, start(arguments, path, way, small)))
                ratios = ", ".join(f"{key} {ratio:.3f}" for key, ratio in rows[-1]["ratios"].items())
                print(f"{name}, {way}: measured / planned: {ratios}", file=sys.stderr, flush=True)
    report(arguments, rows)


def prepare(name: str, scratch: Path) -> str:
    """The model, made where it is a synthetic one."""
    shape, _, type_ = name.partition("-")
    if shape not in SHAPES:
        return name
    folder = scratch / shape
    if not folder.exists():
        make_untrained(folder, shape)
    if not type_:
        return str(folder)
    from gguf import GGMLQuantizationType
    from gguf_files import convert

    file = scratch / f"{name}.gguf"
    convert(folder, file, type_=GGMLQuantizationType[type_.upper()])
    return str(file)


def loading(way: dict[str, Any]) -> LoadingConfig:
    """Options of one way."""
    return LoadingConfig(**{"device": "cpu", "dtype": "float32", "max_context": CONTEXT, **way})


def plan_of(model: str, way: dict[str, Any]) -> MemoryPlan:
    """What is planned."""
    checkpoint = open_checkpoint(model)
    plan = choose_plan(checkpoint, loading(way))
    return plan_memory(checkpoint.network_config, checkpoint.weights, plan, chunk=PREFILL_CHUNK)


def start(arguments: Arguments, model: str, way: str, small: str) -> dict[str, float]:
    """Measure one way in a process of its own."""
    command = [sys.executable, __file__, "--worker", way, "--models", model, small]
    done = subprocess.run([*command, "--threads", str(arguments.threads)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way}: {done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(model: str, way: dict[str, Any], *, warm_up: str) -> dict[str, float]:
    """Bytes that loading and a prompt of one chunk add to a process that has done both with a small model."""
    run(open_checkpoint(warm_up).load_decoder(loading(way)))
    checkpoint = open_checkpoint(model)
    choose_plan(checkpoint, loading(way))  # reads headers, and the tokenizer where it is needed
    return_freed_memory()
    before = status("VmRSS")
    forget_peak()
    decoder = checkpoint.load_decoder(loading(way))
    result = {"weights": status("VmRSS") - before, "peak": status("VmHWM") - before}
    forget_peak()
    run(decoder)
    return {**result, "running": status("VmHWM") - before}


@torch.inference_mode()
def run(decoder: Any) -> None:
    """Read a chunk with a cache of the whole context, all of whose pages are touched."""
    cache = decoder.new_cache(1, CONTEXT)
    tokens = torch.arange(PREFILL_CHUNK).unsqueeze(0) % decoder.config.vocab_size
    for first in (0, PREFILL_CHUNK):
        hidden = decoder.run_layers(
            decoder.embed(tokens), decoder.place(cache, [first], PREFILL_CHUNK), cache, 0, decoder.num_layers
        )
        cache.commit(0, PREFILL_CHUNK)
    decoder.unembed(hidden[:, -1:])


def status(key: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def row(model: str, way: str, planned: MemoryPlan, measured: dict[str, float]) -> dict[str, Any]:
    """One line of the table."""
    expected = {
        "weights": planned.weights,
        "peak": planned.peak,
        "running": planned.weights + planned.cache + planned.working,
    }
    return {
        "model": model,
        "way": way,
        "planned": expected,
        "measured": measured,
        "ratios": {name: measured[name] / expected[name] for name in expected},
    }


def report(arguments: Arguments, rows: list[dict[str, Any]]) -> None:
    """Print a table or JSON, and write the record."""
    content = {"arguments": json.loads(json.dumps(asdict(arguments), default=str)), "rows": rows}
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}))
        return
    table = Table(title="memory in MB: planned, measured, ratio")
    for column in ("model", "way", "weights", "", "", "peak of loading", "", "", "with a full cache", "", ""):
        table.add_column(column, justify="right")
    for entry in rows:
        cells = [entry["model"], entry["way"]]
        for name in entry["planned"]:
            cells += [f"{entry['planned'][name] / 1e6:.1f}", f"{entry['measured'][name] / 1e6:.1f}"]
            cells.append(f"{entry['ratios'][name]:.3f}")
        table.add_row(*cells)
    console = Console(width=150)
    console.print(table)
    console.print(f"{environment()['cpu']}; record: {write_record('memory', content)}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
