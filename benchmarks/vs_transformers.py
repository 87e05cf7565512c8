"""Speed against transformers on the same checkpoint: greedy, float32, batch 1, one run with everything interleaved.

    python benchmarks/vs_transformers.py --model demo
    python benchmarks/vs_transformers.py --model 240m --num-speculations 6

`240m` is a random Llama of 16 layers, width 1024 and vocabulary 32,000 (238M parameters to read for each token). Each
repetition runs the four decoders one after the other on every prompt; the result is the median of the ratios within a
repetition. All four must generate the same tokens.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from arguments import DraftingArguments
from models import load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.transformers_model import load_transformers_model

DECODERS = (
    "transformers, autoregressive",
    "layerskip, autoregressive",
    "transformers, assistant_early_exit",
    "layerskip, self-speculative",
)


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    num_prompts: int = 6


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(arguments.model, Path(scratch), exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        measure(arguments, model)


def measure(arguments: Arguments, model: str) -> None:
    """Run all decoders in turn and report."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lm = layerskip.load(model, dtype="float32", device="cpu")
    reference = load_transformers_model(lm.checkpoint, torch.float32)
    prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
    run = make_runners(arguments, lm, reference)
    outputs = {name: [run[name](prompt) for prompt in prompts] for name in DECODERS}  # a warm-up, then compared
    same = {name: outputs[name] == outputs[DECODERS[0]] for name in DECODERS}
    speeds: dict[str, list[float]] = {name: [] for name in DECODERS}
    for _ in range(arguments.repetitions):
        tokens, seconds = dict.fromkeys(DECODERS, 0), dict.fromkeys(DECODERS, 0.0)
        for prompt in prompts:
            for name in DECODERS:
                start = time.perf_counter()
                tokens[name] += len(run[name](prompt))
                seconds[name] += time.perf_counter() - start
        for name in DECODERS:
            speeds[name].append(tokens[name] / seconds[name])
    report(arguments, speeds, same, acceptance(arguments, lm, prompts))


def make_runners(
    arguments: Arguments, lm: "layerskip.LanguageModel", reference: torch.nn.Module
) -> dict[str, Callable[[list[int]], list[int]]]:
    """Functions from a prompt to new tokens, one for each decoder."""

    def theirs(prompt: list[int], **options: object) -> list[int]:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            **options,
        )
        return out[0, len(prompt) :].tolist()

    def ours(prompt: list[int], **options: object) -> list[int]:
        return lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, **options)[0].token_ids

    early = {
        "assistant_early_exit": arguments.exit_layer,
        "num_assistant_tokens": arguments.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    drafting = {"exit_layer": arguments.exit_layer, "num_speculations": arguments.num_speculations}
    return {
        DECODERS[0]: theirs,
        DECODERS[1]: lambda prompt: ours(prompt, generation_strategy="autoregressive"),
        DECODERS[2]: lambda prompt: theirs(prompt, **early),
        DECODERS[3]: lambda prompt: ours(prompt, generation_strategy="self_speculative", **drafting),
    }


def acceptance(arguments: Arguments, lm: "layerskip.LanguageModel", prompts: list[list[int]]) -> float:
    """Share of drafts that are accepted."""
    results = [
        lm.generate(
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            exit_layer=arguments.exit_layer,
            num_speculations=arguments.num_speculations,
        )[0]
        for prompt in prompts
    ]
    return sum(r.stats.accepted for r in results) / sum(r.stats.drafted for r in results)


def report(arguments: Arguments, speeds: dict[str, list[float]], same: dict[str, bool], accepted: float) -> None:
    """Print a table and write the record."""
    table = Table(title=f"{arguments.model}: exit {arguments.exit_layer}, {arguments.num_speculations} drafts")
    for column in ("decoder", "tokens/s (median)", "min - max", "same tokens"):
        table.add_column(column)
    for name in DECODERS:
        low, high = min(speeds[name]), max(speeds[name])
        table.add_row(
            name, f"{statistics.median(speeds[name]):.1f}", f"{low:.1f} - {high:.1f}", "yes" if same[name] else "NO"
        )
    plain, speculative = _ratio(speeds, 1, 0), _ratio(speeds, 3, 2)
    console = Console()
    console.print(table)
    console.print(f"acceptance {accepted:.3f}")
    console.print(f"autoregressive, ours / transformers:   {plain:.2f} x")
    console.print(f"speculative, ours / transformers:      {speculative:.2f} x")
    console.print(f"ours, speculative / autoregressive:    {_ratio(speeds, 3, 1):.2f} x")
    path = write_record(
        f"vs_transformers-{Path(arguments.model).name}",
        {
            "arguments": json.loads(json.dumps(vars(arguments), default=str)),
            "tokens_per_second": speeds,
            "same_tokens": same,
            "acceptance": accepted,
            "ratios": {"autoregressive": plain, "speculative": speculative, "speedup": _ratio(speeds, 3, 1)},
        },
    )
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


def _ratio(speeds: dict[str, list[float]], one: int, other: int) -> float:
    pairs = zip(speeds[DECODERS[one]], speeds[DECODERS[other]], strict=True)
    return statistics.median(a / b for a, b in pairs)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
