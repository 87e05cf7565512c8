"""Speed of decoding while other processes use the same cores.

    python benchmarks/busy_machine.py                       # the embedded model, beside 0, 1 and 2 busy processes
    python benchmarks/busy_machine.py --neighbours 0 4 8    # more cores, more neighbours

The neighbours compute endlessly without using memory, so any loss of speed is due to their time on the cores. Ratios
are relative to the quiet phase of the same round.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from models import ModelName, load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.progress import track

import layerskip

WAYS = ("autoregressive", "self_speculative")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: ModelName = "demo"
    neighbours: tuple[int, ...] = (0, 1, 2)
    """Numbers of busy processes; the first is the reference for the others."""
    exit_layer: int = 4
    num_speculations: int = 4
    max_new_tokens: int = 96
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    seconds: float = 2.0
    """Seconds of each strategy in each phase."""
    repetitions: int = 3
    threads: int = 2


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        lm = layerskip.load(prepare(arguments.model, Path(scratch)), dtype="float32")
    (prompt,) = load_prompts(lm, arguments.prompts, 1)
    lm.generate([prompt], max_new_tokens=arguments.max_new_tokens)  # warms up
    speeds: dict[str, dict[int, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for _ in track(range(arguments.repetitions), "repetitions"):
        for count in arguments.neighbours:
            with busy(count):
                for way in WAYS:
                    speeds[way][count].append(tokens_per_second(lm, prompt, way, arguments))
    report(arguments, speeds)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run a number of busy processes."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_second(lm: layerskip.LanguageModel, prompt: list[int], way: str, arguments: Arguments) -> float:
    """Tokens/s after the first token, over as many texts as the time allows."""
    options: dict[str, Any] = {"generation_strategy": way, "ignore_eos": True, "do_sample": False}
    if way != "autoregressive":
        options |= {"exit_layer": arguments.exit_layer, "num_speculations": arguments.num_speculations}
    end, tokens, seconds = time.perf_counter() + arguments.seconds, 0, 0.0
    while time.perf_counter() < end:
        stats = lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, **options)[0].stats
        tokens += stats.tokens - 1
        seconds += stats.seconds - stats.time_to_first_token_s
    return tokens / seconds


def report(arguments: Arguments, speeds: dict[str, dict[int, list[float]]]) -> None:
    """Print the medians, and write the record."""
    console = Console(width=110)
    first = arguments.neighbours[0]
    for way, found in speeds.items():
        for count, values in found.items():
            ratio = statistics.median(a / b for a, b in zip(values, found[first], strict=True))
            console.print(
                f"{way:17} beside {count} busy: {statistics.median(values):8.1f} tokens/s, "
                f"{ratio:.2f} of that beside {first}"
            )
    content = {"arguments": json.loads(json.dumps(asdict(arguments), default=str)), "tokens_per_second": speeds}
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {write_record('busy', content)}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
