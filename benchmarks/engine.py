"""How close decoding comes to the limits of the machine, and speculation to what its acceptance allows.

    python benchmarks/engine.py --model 240m --num-speculations 2 4 6
    python benchmarks/engine.py --model demo --kernels torch
    python benchmarks/engine.py --model 8b --device cuda --dtype bfloat16

Models are checkpoints, or shapes from `synthetic.py` that are made on the spot. Printed, and recorded as JSON:

- the roofline: bytes a second that a product with one row reads, by kernel;
- tokens/s of autoregressive and self-speculative decoding, interleaved, prompts not counted, and the bytes of weights
  that autoregressive decoding reads a second over the roofline's;
- the ideal speedup of the acceptance that was seen: tokens a round, times the seconds of a step, over the seconds of a
  round's parts, each timed alone; and what of it was reached;
- where the time of a round goes.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table
from roofline import matrix_vector_bandwidth
from synthetic import SHAPES, encode_prompts, make_synthetic, random_prompts

import layerskip
from layerskip.decoding.costs import CallTimer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "demo"
    """demo, a shape (tiny, 240m, 1b, 8b), a folder or a hub id."""
    exit_layer: int | None = None
    """A quarter of the layers if not given."""
    num_speculations: tuple[int, ...] = (2, 4, 6)
    agreement: float = 0.9
    """Share of random tokens on which a synthetic model's exit agrees with its last layer; less on its own text."""
    device: str = "cpu"
    dtype: str = "float32"
    kernels: str = "auto"
    max_new_tokens: int = 64
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    """JSON lines with a field `prompt`; synthetic models get random tokens instead."""
    num_prompts: int = 4
    repetitions: int = 5
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class Round:
    """What speculation with one draft length reached."""

    num_speculations: int
    tokens_per_second: float
    acceptance_rate: float
    """Share of the drafts that were accepted."""
    tokens_per_round: float
    speedup: float
    """Median over repetitions, against the autoregressive run beside it."""
    ideal_speedup: float
    efficiency: float
    round_ms: float
    parts_ms: dict[str, float]
    """Each timed alone; `other` is what a round takes beyond them."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    console = Console()
    bandwidth = matrix_vector_bandwidth(torch.device(arguments.device), getattr(torch, arguments.dtype))
    console.print("roofline: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in bandwidth.items()))
    with tempfile.TemporaryDirectory() as scratch:
        lm, exit_layer = load(arguments, Path(scratch), console)
        prompts = load_prompts(arguments, lm)
        speeds, results = decode(arguments, lm, exit_layer, prompts)
        step, rounds = judge(arguments, lm, exit_layer, speeds, results, len(prompts[0]))
    report(arguments, lm, exit_layer, console, bandwidth, speeds[0], step, rounds)


def load(arguments: Arguments, scratch: Path, console: Console) -> tuple[layerskip.LanguageModel, int]:
    """The model, and the exit that drafts."""
    model = arguments.model
    if model in SHAPES:
        layers = SHAPES[model]["num_hidden_layers"]
        reached = make_synthetic(
            scratch,
            model,
            exit_layer=arguments.exit_layer or layers // 4,
            agreement=arguments.agreement,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
        )
        console.print(f"{model}: random weights, the exit agrees on {reached:.2f} of random tokens")
        model = str(scratch)
    lm = layerskip.load(model, dtype=arguments.dtype, device=arguments.device, kernels=arguments.kernels)  # type: ignore[arg-type]
    return lm, arguments.exit_layer or max(1, lm.config.num_layers // 4)


def load_prompts(arguments: Arguments, lm: layerskip.LanguageModel) -> list[list[int]]:
    """Token ids."""
    if arguments.model in SHAPES:
        return random_prompts(lm.config.vocab_size, arguments.num_prompts)
    return encode_prompts(arguments.prompts, arguments.num_prompts, lm.encode)


def decode(
    arguments: Arguments, lm: layerskip.LanguageModel, exit_layer: int, prompts: list[list[int]]
) -> tuple[dict[int, list[float]], dict[int, list[layerskip.GenerationResult]]]:
    """Tokens/s of each repetition, and the last one's results, by draft length; 0 is autoregressive."""
    settings = {0: {"generation_strategy": "autoregressive"}} | {
        k: {"generation_strategy": "self_speculative", "exit_layer": exit_layer, "num_speculations": k}
        for k in arguments.num_speculations
    }
    speeds: dict[int, list[float]] = {k: [] for k in settings}
    results: dict[int, list[layerskip.GenerationResult]] = {}
    for repetition in range(arguments.repetitions + 1):
        runs: dict[int, list[layerskip.GenerationResult]] = {k: [] for k in settings}
        for prompt in prompts:
            for k, options in settings.items():
                result = lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, **options)[0]
                runs[k].append(result)
        if repetition == 0:  # warms up
            continue
        results = runs
        for k, done in runs.items():
            tokens = sum(r.stats.tokens - 1 for r in done)
            speeds[k].append(tokens / sum(r.stats.seconds - r.stats.time_to_first_token_s for r in done))
    return speeds, results


def judge(
    arguments: Arguments,
    lm: layerskip.LanguageModel,
    exit_layer: int,
    speeds: dict[int, list[float]],
    results: dict[int, list[layerskip.GenerationResult]],
    prompt_length: int,
) -> tuple[float, list[Round]]:
    """Seconds of a step timed alone, and every draft length against its ideal."""
    decoder, depth = lm.decoder, lm.config.num_layers
    most = max(arguments.num_speculations) + 1
    timer = CallTimer(decoder, 1, most, context=prompt_length + arguments.max_new_tokens // 2)

    def seconds(start: int, stop: int, n: int, head: bool = True) -> float:
        return timer.seconds(start, stop, n, head=head, repetitions=31)

    step, rounds = seconds(0, depth, 1), []
    draft, exit_pass = seconds(0, exit_layer, 1), seconds(0, exit_layer, 1, head=False)
    for k in arguments.num_speculations:
        done = results[k]
        parts = {
            "drafts": k * draft,
            "last draft's layers": exit_pass,
            "verification": seconds(exit_layer, depth, k + 1),
        }
        tokens = sum(r.stats.tokens - 1 for r in done) / sum(r.stats.rounds for r in done)
        time = sum(r.stats.seconds - r.stats.time_to_first_token_s for r in done) / sum(r.stats.rounds for r in done)
        speedup = statistics.median(a / b for a, b in zip(speeds[k], speeds[0], strict=True))
        ideal = tokens * step / sum(parts.values())
        rounds.append(
            Round(
                num_speculations=k,
                tokens_per_second=statistics.median(speeds[k]),
                acceptance_rate=sum(r.stats.accepted for r in done) / sum(r.stats.drafted for r in done),
                tokens_per_round=tokens,
                speedup=speedup,
                ideal_speedup=ideal,
                efficiency=speedup / ideal,
                round_ms=1e3 * time,
                parts_ms={name: 1e3 * part for name, part in parts.items()}
                | {"other": 1e3 * (time - sum(parts.values()))},
            )
        )
    return step, rounds


def report(
    arguments: Arguments,
    lm: layerskip.LanguageModel,
    exit_layer: int,
    console: Console,
    bandwidth: dict[str, float],
    plain: list[float],
    step: float,
    rounds: list[Round],
) -> None:
    """Print tables and write the record."""
    weight_bytes = lm.decoder.weight_bytes(0, lm.config.num_layers)
    speed, roof = statistics.median(plain), max(bandwidth.values())
    used = speed * weight_bytes / 1e9
    console.print(
        f"autoregressive: {speed:.1f} tokens/s ({min(plain):.1f} - {max(plain):.1f}), "
        f"{weight_bytes / 1e6:.1f} MB a token, {used:.1f} GB/s, {used / roof:.0%} of the roofline; "
        f"a step alone {1e3 * step:.2f} ms, in the loop {1e3 / speed:.2f} ms"
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
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "bandwidth_gb_per_second": bandwidth,
        "weight_bytes": weight_bytes,
        "autoregressive": {
            "tokens_per_second": plain,
            "gb_per_second": used,
            "of_roofline": used / roof,
            "step_s": step,
        },
        "rounds": [asdict(r) for r in rounds],
    }
    path = write_record(f"engine-{Path(arguments.model).name}", content)
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
