"""Speed against OpenVINO GenAI on the same GGUF file: greedy, batch 1, CPU, interleaved in one process.

    pip install openvino-genai
    python benchmarks/vs_openvino.py --model smollm2
    python benchmarks/vs_openvino.py --model smollm2 --formats f16 q8_0 --precisions bf16 --backends SDPA

OpenVINO GenAI reads GGUF files of Llama and Qwen in f16, q8_0, q4_0 and q4_1; with others it stops with its own
message. The files are exported from the model by this package; `file` is its own. Each precision of the products
(`--precisions`) is measured with each way to compute attention (`--backends`): PA is OpenVINO's default, with a paged
cache, SDPA is often faster for one prompt. Beginnings of prompts aren't kept: each prompt is read anew. Its threads
aren't pinned, as ours.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from arguments import PromptArguments
from models import gguf_file, load_prompts, long_prompts
from peers import Run, Way, interleave, load_each, our_prompt, our_text, show
from record import environment, processor, write_record
from rich.console import Console

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.loading.placement import check_compute
from layerskip.errors import InvalidArgumentError
from layerskip.export.gguf.write import export_gguf

Format = Literal["file", "f16", "q8_0", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class Arguments(PromptArguments):
    """Options of the benchmark."""

    model: str = "smollm2"
    formats: tuple[Format, ...] = ("f16", "q8_0", "q4_0")
    """What the model is exported as; `file`: the model's GGUF file as it is."""
    precisions: tuple[Literal["bf16", "f32"], ...] = ("bf16", "f32")
    """Of OpenVINO's products. Its own choice is bf16 where the processor has instructions for it, else f32."""
    backends: tuple[Literal["PA", "SDPA"], ...] = ("PA", "SDPA")
    """How OpenVINO computes attention."""
    compute: tuple[str, ...] = ("float32",)
    """How our products are computed: values of the option of `layerskip.load`."""
    load: dict[str, str] = field(default_factory=dict)
    """Further options of `layerskip.load` as pairs, such as `cache_dtype bfloat16`."""
    prompt_tokens: int = 512
    """Length of the prompts whose reading is measured."""
    num_long_prompts: int = 2
    """Number of these prompts."""
    json: bool = False
    """Print the record, and nothing else."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    for compute in arguments.compute:
        check_compute(compute, native=True)
    torch.set_num_threads(arguments.threads)
    console = Console(quiet=arguments.json, width=120)
    versions = describe_openvino()
    console.print(", ".join(f"{key} {value}" for key, value in versions.items()), markup=False)
    console.print(f"{processor()}, {arguments.threads} threads", markup=False)
    with tempfile.TemporaryDirectory() as scratch:
        formats = {
            name: measure(arguments, console, name, find_file(arguments.model, name, Path(scratch)))
            for name in arguments.formats
        }
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "build": versions,
        "formats": formats,
    }
    path = write_record(f"vs_openvino-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    console.print(f"record: {path}", markup=False, soft_wrap=True)


def describe_openvino() -> dict[str, str]:
    """Versions, and what OpenVINO says of the processor; ends the program with a message if it isn't installed."""
    try:
        import openvino
        import openvino_genai
    except ImportError as error:
        raise SystemExit(f"this benchmark needs OpenVINO GenAI ({error}): pip install openvino-genai") from error
    core = openvino.Core()
    return {
        "openvino": openvino.__version__,
        "openvino_genai": openvino_genai.__version__,
        "capabilities": " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "own_precision": core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string(),
    }


def find_file(model: str, name: Format, folder: Path) -> Path:
    """The file of a format, exported if it isn't the model's own."""
    if name != "file":
        file = folder / f"{name}.gguf"
        export_gguf(open_checkpoint(model), file, type_name=name)
        return file
    own = gguf_file(model)
    if own is None:
        raise InvalidArgumentError(f"{model} is not a GGUF file; leave out --formats file")
    return own


def measure(arguments: Arguments, console: Console, name: Format, file: Path) -> dict[str, Any]:
    """Measure one format, and print tables; returns what belongs in the record."""
    texts: dict[str, Way] = {}
    reads: dict[str, Way] = {}
    for label, pipeline in pipelines(arguments, file):
        texts[label] = their_text(pipeline, arguments.max_new_tokens)
        reads[label] = their_prompt(pipeline)
    reference = next(iter(texts))
    ours = dict(load_each(str(file), arguments.compute, arguments.load, console))
    if not ours:
        raise InvalidArgumentError(f"no --compute of {', '.join(arguments.compute)} can be used with {name}")
    for compute, lm in ours.items():
        texts[f"ours, {compute}"] = our_text(lm, arguments.max_new_tokens, generation_strategy="autoregressive")
        texts[f"ours, {compute}, adaptive"] = our_text(lm, arguments.max_new_tokens, generation_strategy="adaptive")
        reads[f"ours, {compute}"] = our_prompt(lm)
    short = load_prompts(lm, arguments.prompts, arguments.num_prompts)
    long = long_prompts(lm, arguments.prompts, arguments.num_long_prompts, arguments.prompt_tokens)
    decoding = interleave(texts, short, arguments.repetitions)
    show(console, f"{arguments.model}, {name}: decoding", decoding, reference)
    prompts = interleave(reads, long, arguments.repetitions)
    show(console, f"{arguments.model}, {name}: prompts of {arguments.prompt_tokens} tokens", prompts, reference)
    return {
        "file_bytes": file.stat().st_size,
        "reference": reference,
        "decoding": decoding.record(reference),
        "prompts": prompts.record(reference),
    }


def pipelines(arguments: Arguments, file: Path) -> Iterator[tuple[str, Any]]:
    """OpenVINO's pipelines for the file by name, each with its own copy of the weights."""
    import openvino_genai

    for precision in arguments.precisions:
        for backend in arguments.backends:
            options: dict[str, Any] = {
                "INFERENCE_NUM_THREADS": arguments.threads,
                "INFERENCE_PRECISION_HINT": precision,
                "ENABLE_CPU_PINNING": False,
                "ATTENTION_BACKEND": backend,
            }
            if backend == "PA":
                scheduler = openvino_genai.SchedulerConfig()
                scheduler.enable_prefix_caching = False
                scheduler.max_num_batched_tokens = max(4096, arguments.prompt_tokens)  # a prompt in one piece
                options["scheduler_config"] = scheduler
            yield f"OpenVINO, {precision}, {backend}", openvino_genai.LLMPipeline(str(file), "CPU", **options)


def their_text(pipeline: Any, max_new_tokens: int) -> Way:
    """OpenVINO's text; the first token belongs to the prompt."""

    def run(prompt: list[int]) -> Run:
        tokens, first, whole = generate(pipeline, prompt, max_new_tokens)
        return Run(tokens=tokens, work=len(tokens) - 1, seconds=whole - first)

    return run


def their_prompt(pipeline: Any) -> Way:
    """A prompt in OpenVINO, until its next token."""

    def run(prompt: list[int]) -> Run:
        tokens, first, _ = generate(pipeline, prompt, 1)
        return Run(tokens=tokens, work=len(prompt), seconds=first)

    return run


def generate(pipeline: Any, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float, float]:
    """New tokens, and OpenVINO's own measurements: seconds until the first one, and of all."""
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = max_new_tokens, False, True
    result = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), config)
    metrics = result.perf_metrics
    return list(result.tokens[0]), metrics.get_ttft().mean / 1e3, metrics.get_generate_duration().mean / 1e3


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
