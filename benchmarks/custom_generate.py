"""Speed of the exported `custom_generate` against transformers' own decoding and `assistant_early_exit`.

    python benchmarks/custom_generate.py --model demo --exit-layer 4
    python benchmarks/custom_generate.py --model smollm2 --exit-layer 20 --num-speculations 2 --json

The same transformers model in float32, the same exit layer and number of drafts, greedy, batch 1. Each repetition runs
the decoders one after the other on every prompt; the result is the median of the ratios within a repetition. All must
generate the same tokens. The code runs from an exported folder, as a user's would.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arguments import DraftingArguments
from models import load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.export.custom_generation import write_custom_generation

DECODERS = ("plain", "assistant_early_exit", "custom_generate")


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the record as JSON, and nothing else, on standard output."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        name = prepare(arguments.model, folder, exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        lm = layerskip.load(name, dtype="float32", device="cpu")
        model = load_transformers_model(lm.checkpoint, torch.float32)
        code = write_custom_generation(Path(scratch) / "code").folder
        prompts = [torch.tensor([ids]) for ids in load_prompts(lm, arguments.prompts, arguments.num_prompts)]
        report(arguments, measure(arguments, make_runners(arguments, model, code), prompts))


def make_runners(arguments: Arguments, model: Any, code: Path) -> dict[str, Callable[[torch.Tensor], list[int]]]:
    """Functions from a prompt to new tokens, one for each decoder."""

    def run(ids: torch.Tensor, **options: Any) -> list[int]:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            **options,
        )
        return output[0, ids.shape[1] :].tolist()

    early = {
        "assistant_early_exit": arguments.exit_layer,
        "num_assistant_tokens": arguments.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    ours = {
        "custom_generate": str(code),
        "trust_remote_code": True,
        "exit_layer": arguments.exit_layer,
        "num_speculations": arguments.num_speculations,
    }
    return {
        "plain": run,
        "assistant_early_exit": lambda ids: run(ids, **early),
        "custom_generate": lambda ids: run(ids, **ours),
    }


def measure(
    arguments: Arguments, run: dict[str, Callable[[torch.Tensor], list[int]]], prompts: list[torch.Tensor]
) -> dict[str, Any]:
    """Run all decoders in turn."""
    outputs = {name: [run[name](prompt) for prompt in prompts] for name in DECODERS}  # a warm-up, then compared
    speeds: dict[str, list[float]] = {name: [] for name in DECODERS}
    for _ in range(arguments.repetitions):
        seconds = dict.fromkeys(DECODERS, 0.0)
        for prompt in prompts:
            for name in DECODERS:
                start = time.perf_counter()
                run[name](prompt)
                seconds[name] += time.perf_counter() - start
        for name in DECODERS:
            speeds[name].append(sum(map(len, outputs[name])) / seconds[name])

    def ratio(name: str) -> float:
        pairs = zip(speeds["custom_generate"], speeds[name], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    return {
        "arguments": json.loads(json.dumps(vars(arguments), default=str)),
        "tokens_per_second": speeds,
        "same_tokens": {name: outputs[name] == outputs["plain"] for name in DECODERS},
        "ratios": {"to_assistant_early_exit": ratio("assistant_early_exit"), "to_plain": ratio("plain")},
    }


def report(arguments: Arguments, content: dict[str, Any]) -> None:
    """Print the result and write the record."""
    path = write_record(f"custom_generate-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({**content, "record": str(path)}))
        return
    table = Table(title=f"{arguments.model}: exit {arguments.exit_layer}, {arguments.num_speculations} drafts")
    for column in ("decoder", "tokens/s (median)", "min - max", "same tokens"):
        table.add_column(column)
    for name, speeds in content["tokens_per_second"].items():
        row = f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f} - {max(speeds):.1f}"
        table.add_row(name, *row, "yes" if content["same_tokens"][name] else "NO")
    console = Console()
    console.print(table)
    for name, value in content["ratios"].items():
        console.print(f"custom_generate {name.replace('_', ' ', 1)}: {value:.2f} x")
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
