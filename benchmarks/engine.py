"""Speed of decoding against the limits of the machine, and of speculation against the limits of its acceptance.

    python benchmarks/engine.py --model 240m --num-speculations 2 4 6
    python benchmarks/engine.py --model demo --kernels torch
    python benchmarks/engine.py --model 8b --device cuda --dtype bfloat16 --adaptive

Models are checkpoints, or shapes from `synthetic.py` that are made for the run. It prints, and records as JSON:

- the roofline: bytes that a product with one row reads in a second, by kernel;
- tokens/s of autoregressive and self-speculative decoding, interleaved and without the prompts, and the bytes of
  weights that autoregressive decoding reads in a second divided by the roofline's;
- the ideal speedup for the measured acceptance (tokens in a round, times the seconds of a step, divided by the seconds
  of a round's parts, each timed alone), and the share of it that was reached;
- the time of each part of a round;
- with `--adaptive`, adaptive decoding beside the fixed draft lengths; on CUDA, the captured graphs and their seconds.

On CUDA a round is one captured graph, so its parts can't be timed alone. The ideal there is the time that the
roofline's rate needs for the bytes of weights that a step and a round read.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import PromptArguments
from models import load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.table import Table
from roofline import Roofline

import layerskip
from layerskip.decoding.adaptive.call_timer import CallTimer
from layerskip.model.decoders.graphs import GraphDecoder

ADAPTIVE = -1
"""Key of adaptive decoding among results that are kept by draft length."""


@dataclass(frozen=True, kw_only=True)
class Arguments(PromptArguments):
    """Options of the benchmark."""

    exit_layer: int | None = None
    """A quarter of the layers if not given."""
    num_speculations: tuple[int, ...] = (2, 4, 6)
    agreement: float = 0.9
    """Share of random tokens on which a synthetic model's exit agrees with its last layer; less on its own text."""
    device: str = "cpu"
    dtype: str = "float32"
    kernels: str = "auto"
    adaptive: bool = False
    """Measure adaptive decoding too."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Results of speculation with one draft length."""

    num_speculations: int
    tokens_per_second: float
    acceptance_rate: float
    """Share of the drafts that were accepted."""
    tokens_per_round: float
    speedup: float
    """Median over repetitions of the ratio to the autoregressive run beside it."""
    ideal_speedup: float
    efficiency: float
    round_ms: float
    parts_ms: dict[str, float]
    """Milliseconds of each part, timed alone, or on CUDA computed from the roofline; `other` is the rest of a round,
    which is negative if drafting in one call takes less."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    console = Console(width=110)
    path = write_record(f"engine-{Path(arguments.model).name}", run(arguments, console))
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


def run(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Measure and print; returns the record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        lm, exit_layer = load(arguments, Path(scratch))
        measurements = measure(arguments, lm, exit_layer, load_prompts(lm, arguments.prompts, arguments.num_prompts))
    return report(arguments, lm, exit_layer, console, measurements)


def load(arguments: Arguments, scratch: Path) -> tuple[layerskip.LanguageModel, int]:
    """The model, and the exit layer that drafts."""
    model = prepare(
        arguments.model,
        scratch,
        exit_layer=arguments.exit_layer,
        agreement=arguments.agreement,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
    )
    lm = layerskip.load(model, dtype=arguments.dtype, device=arguments.device, kernels=arguments.kernels)  # type: ignore[arg-type]
    return lm, arguments.exit_layer or max(1, lm.config.num_layers // 4)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One repetition; it takes seconds, so that a drifting machine has the same speed for everything in it."""

    bandwidth: dict[str, float]
    speeds: dict[int, float]
    """Tokens/s by draft length; 0 is autoregressive."""
    results: dict[int, list[layerskip.GenerationResult]]
    step: float
    """Seconds of an autoregressive step, timed alone."""
    parts: dict[int, dict[str, float]]
    """Seconds of a round's parts by draft length, each timed alone."""


def measure(
    arguments: Arguments, lm: layerskip.LanguageModel, exit_layer: int, prompts: list[list[int]]
) -> list[Measurement]:
    """Run the repetitions, after one as a warm-up."""
    roofline = Roofline(torch.device(arguments.device), getattr(torch, arguments.dtype))
    context = sum(map(len, prompts)) // len(prompts) + arguments.max_new_tokens // 2
    timer = CallTimer(lm.decoder, 1, max(arguments.num_speculations) + 1, context=context)
    depth = lm.config.num_layers
    rate = 0.0

    def seconds(start: int, stop: int, num_queries: int, *, head: bool = True) -> float:
        if isinstance(lm.decoder, GraphDecoder):
            return lm.decoder.weight_bytes(start, stop, head=head) / rate
        return timer.seconds(start, stop, num_queries, head=head, repetitions=15)

    measurements = []
    for _ in range(arguments.repetitions + 1):
        results = decode(arguments, lm, exit_layer, prompts)
        bandwidth = roofline.gigabytes_per_second()
        rate = 1e9 * max(bandwidth.values())
        step, draft, last = seconds(0, depth, 1), seconds(0, exit_layer, 1), seconds(0, exit_layer, 1, head=False)
        parts = {
            k: {"drafts": k * draft, "last draft's layers": last, "verification": seconds(exit_layer, depth, k + 1)}
            for k in arguments.num_speculations
        }
        measurements.append(
            Measurement(
                bandwidth=bandwidth,
                speeds={k: _tokens(done) / _seconds(done) for k, done in results.items()},
                results=results,
                step=step,
                parts=parts,
            )
        )
    return measurements[1:]


def decode(
    arguments: Arguments, lm: layerskip.LanguageModel, exit_layer: int, prompts: list[list[int]]
) -> dict[int, list[layerskip.GenerationResult]]:
    """Results by draft length; the draft lengths alternate on every prompt."""
    settings: dict[int, dict[str, Any]] = {0: {"generation_strategy": "autoregressive"}} | {
        k: {"generation_strategy": "self_speculative", "exit_layer": exit_layer, "num_speculations": k}
        for k in arguments.num_speculations
    }
    if arguments.adaptive:
        settings[ADAPTIVE] = {"generation_strategy": "adaptive"}
    results: dict[int, list[layerskip.GenerationResult]] = {k: [] for k in settings}
    for prompt in prompts:
        for k, options in settings.items():
            results[k] += lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, **options)
    return results


def judge(measurements: list[Measurement], num_speculations: int) -> Round:
    """A draft length against its ideal: medians over the repetitions."""
    done = measurements[-1].results[num_speculations]  # greedy: the same in all repetitions
    rounds = sum(r.stats.rounds for r in done)
    tokens = _tokens(done) / rounds
    sums = [sum(m.parts[num_speculations].values()) for m in measurements]
    speedups = [m.speeds[num_speculations] / m.speeds[0] for m in measurements]
    ideals = [tokens * m.step / total for m, total in zip(measurements, sums, strict=True)]
    times = [_seconds(m.results[num_speculations]) / rounds for m in measurements]
    parts = {
        name: 1e3 * statistics.median(m.parts[num_speculations][name] for m in measurements)
        for name in measurements[0].parts[num_speculations]
    }
    parts["other"] = 1e3 * statistics.median(time - total for time, total in zip(times, sums, strict=True))
    return Round(
        num_speculations=num_speculations,
        tokens_per_second=statistics.median(m.speeds[num_speculations] for m in measurements),
        acceptance_rate=sum(r.stats.accepted for r in done) / sum(r.stats.drafted for r in done),
        tokens_per_round=tokens,
        speedup=statistics.median(speedups),
        ideal_speedup=statistics.median(ideals),
        efficiency=statistics.median(a / b for a, b in zip(speedups, ideals, strict=True)),
        round_ms=1e3 * statistics.median(times),
        parts_ms=parts,
    )


def report(
    arguments: Arguments,
    lm: layerskip.LanguageModel,
    exit_layer: int,
    console: Console,
    measurements: list[Measurement],
) -> dict[str, Any]:
    """Print tables; returns the record."""
    weight_bytes = lm.decoder.weight_bytes(0, lm.config.num_layers)
    plain = [m.speeds[0] for m in measurements]
    used = [speed * weight_bytes / 1e9 for speed in plain]
    share = statistics.median(rate / max(m.bandwidth.values()) for rate, m in zip(used, measurements, strict=True))
    bandwidth = {name: statistics.median(m.bandwidth[name] for m in measurements) for name in measurements[0].bandwidth}
    step = statistics.median(m.step for m in measurements)
    rounds = [judge(measurements, k) for k in arguments.num_speculations]
    console.print("roofline: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in bandwidth.items()))
    console.print(
        f"autoregressive: {statistics.median(plain):.1f} tokens/s ({min(plain):.1f} - {max(plain):.1f}), "
        f"{weight_bytes / 1e6:.1f} MB a token, {statistics.median(used):.1f} GB/s, {share:.0%} of the roofline; "
        f"a step alone {1e3 * step:.2f} ms, in the loop {1e3 / statistics.median(plain):.2f} ms"
    )
    table = Table(title=f"{arguments.model}, drafts by layers 1 to {exit_layer}")
    for column in ("drafts", "tokens/s", "accepted", "tokens a round", "speedup", "ideal", "of it"):
        table.add_column(column, justify="right")
    for r in rounds:
        figures = (r.acceptance_rate, r.tokens_per_round, r.speedup, r.ideal_speedup)
        row = (str(r.num_speculations), f"{r.tokens_per_second:.1f}", *(f"{x:.2f}" for x in figures))
        table.add_row(*row, f"{r.efficiency:.0%}")
    console.print(table)
    for r in rounds:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in r.parts_ms.items())
        console.print(f"a round of {r.num_speculations} drafts takes {r.round_ms:.2f} ms; alone: {parts}")
    content = {
        "device": torch.cuda.get_device_name(lm.decoder.device) if lm.decoder.device.type == "cuda" else "cpu",
        "kernels": lm.decoder.kernels,
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "bandwidth_gb_per_second": bandwidth,
        "weight_bytes": weight_bytes,
        "autoregressive": {"tokens_per_second": plain, "gb_per_second": used, "of_roofline": share, "step_s": step},
        "rounds": [asdict(r) for r in rounds],
    }
    if arguments.adaptive:
        speeds = [m.speeds[ADAPTIVE] for m in measurements]
        speedup = statistics.median(m.speeds[ADAPTIVE] / m.speeds[0] for m in measurements)
        console.print(f"adaptive: {statistics.median(speeds):.1f} tokens/s, {speedup:.2f}x autoregressive")
        content["adaptive"] = {"tokens_per_second": speeds, "speedup": speedup}
    captured = lm.decoder.compiled if isinstance(lm.decoder, GraphDecoder) else ()
    if captured:
        took = [x.seconds for x in captured]
        console.print(f"{len(took)} rounds captured, {statistics.median(took):.2f} s each, {max(took):.2f} s at most")
        content["captured"] = [
            {**asdict(x.shape), "seconds": round(x.seconds, 4), "problem": x.problem} for x in captured
        ]
    return content


def _tokens(results: list[layerskip.GenerationResult]) -> int:
    """Tokens after each prompt's first."""
    return sum(r.stats.tokens - 1 for r in results)


def _seconds(results: list[layerskip.GenerationResult]) -> float:
    """Seconds after each prompt's first token."""
    return sum(r.stats.seconds - r.stats.time_to_first_token_s for r in results)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Arguments, description=__doc__))
