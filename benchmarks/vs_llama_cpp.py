"""Speed against llama.cpp on the same weights: greedy, batch 1, CPU, everything interleaved in one process.

    pip install llama-cpp-python gguf
    python benchmarks/vs_llama_cpp.py --model demo
    python benchmarks/vs_llama_cpp.py --model 240m --num-speculations 4
    python benchmarks/vs_llama_cpp.py --model smollm2 --exit-layer 2 --num-speculations 2 --compute int8

llama.cpp runs a GGUF file as it is; another checkpoint is exported as a float32 GGUF file first. It gets tokens one by
one through its C interface. Tokens of the prompt are not counted. With the same weights, both engines
generate the same text, up to near-ties.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import llama_cpp
import torch
import tyro
from arguments import DraftingArguments
from llama_cpp_model import LlamaCpp
from models import gguf_file, load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.export.gguf.write import export_gguf

LLAMA, OURS, SPECULATIVE, ADAPTIVE = "llama.cpp", "autoregressive", "self-speculative", "adaptive"


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    bfloat16_weights: bool = False
    """Round our weights to bfloat16, which the native kernels keep. Without this option both engines have the same
    numbers: a GGUF file as it is, other models in float32."""
    compute: Literal["float32", "int8", "bfloat16"] = "float32"
    """Whether our products take their inputs in 8 bits, as llama.cpp's do with quantized files."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(arguments.model, Path(scratch), exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        lm = layerskip.load(model, dtype="float32", device="cpu", compute=arguments.compute)
        file = gguf_file(model) or Path(scratch) / "model.gguf"
        if not file.exists():
            export_gguf(lm.checkpoint, file, type_name="f32")
        prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
        context = max(map(len, prompts)) + arguments.max_new_tokens + 8
        theirs = LlamaCpp(file, context, arguments.threads)
        if arguments.bfloat16_weights:
            lm = in_bfloat16(lm, Path(scratch) / "bfloat16")
        measure(arguments, lm, theirs, prompts)


def in_bfloat16(lm: layerskip.LanguageModel, folder: Path) -> layerskip.LanguageModel:
    """The model with its weights rounded to bfloat16, as most checkpoints are published."""
    load_transformers_model(lm.checkpoint, torch.bfloat16).save_pretrained(folder)
    return layerskip.load(str(folder), dtype="float32", device="cpu")


def measure(arguments: Arguments, lm: layerskip.LanguageModel, theirs: LlamaCpp, prompts: list[list[int]]) -> None:
    """Run everything in turn and report."""
    options = {
        OURS: {"generation_strategy": "autoregressive"},
        SPECULATIVE: {
            "generation_strategy": "self_speculative",
            "exit_layer": arguments.exit_layer,
            "num_speculations": arguments.num_speculations,
        },
        ADAPTIVE: {"generation_strategy": "adaptive"},
    }
    speeds: dict[str, list[float]] = {LLAMA: [], **{name: [] for name in options}}
    same = dict.fromkeys(speeds, 0)
    for repetition in range(arguments.repetitions + 1):
        tokens, seconds = dict.fromkeys(speeds, 0), dict.fromkeys(speeds, 0.0)
        for prompt in prompts:
            expected, spent = theirs.write(prompt, arguments.max_new_tokens)
            tokens[LLAMA] += len(expected) - 1
            seconds[LLAMA] += spent
            same[LLAMA] += repetition == 0
            for name, strategy in options.items():
                result = lm.generate(
                    [prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, ignore_eos=True, **strategy
                )[0]
                tokens[name] += result.stats.tokens - 1
                seconds[name] += result.stats.seconds - result.stats.time_to_first_token_s
                same[name] += repetition == 0 and result.token_ids == expected
        if repetition:  # the first warms up
            for name, values in speeds.items():
                values.append(tokens[name] / seconds[name])
    report(arguments, speeds, same, len(prompts))


def report(arguments: Arguments, speeds: dict[str, list[float]], same: dict[str, int], num_prompts: int) -> None:
    """Print a table and write the record."""
    table = Table(title=f"{arguments.model}: exit {arguments.exit_layer}, {arguments.num_speculations} drafts")
    for column in ("decoder", "tokens/s (median)", "min - max", "over llama.cpp", "same texts"):
        table.add_column(column)
    ratios = {}
    for name, values in speeds.items():
        ratios[name] = statistics.median(a / b for a, b in zip(values, speeds[LLAMA], strict=True))
        span = f"{min(values):.1f} - {max(values):.1f}"
        equal = f"{same[name]} of {num_prompts}"
        table.add_row(name, f"{statistics.median(values):.1f}", span, f"{ratios[name]:.2f}", equal)
    console = Console()
    console.print(table)
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "llama_cpp_python": llama_cpp.__version__,
        "tokens_per_second": speeds,
        "same_texts": same,
        "ratios": ratios,
    }
    path = write_record(f"vs_llama_cpp-{Path(arguments.model).name}", content)
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
