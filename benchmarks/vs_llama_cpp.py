"""Speed against llama.cpp, format by format, both of the same file: greedy, batch 1, CPU, interleaved in one process.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/vs_llama_cpp.py --model smollm2 --folder files
    python benchmarks/vs_llama_cpp.py --model smollm2 --formats file --exit-layer 2 --num-speculations 2
    python benchmarks/vs_llama_cpp.py --model 240m --folder files --measure decoding prompts --formats bf16 q4_k_m

The model is exported as float32, and llama.cpp's own quantizer writes each format from that; `file` is the model's own
GGUF file. Three things are measured for each format:

- decoding: tokens/s after the prompt, ours once for each `--compute`;
- speculation: llama.cpp with drafts of a second model (the first `--exit-layer` layers, exported in the same format;
  see docs/export.md) and from the text (llama-cpp-python's prompt lookup); ours at a fixed exit, and adaptive;
- prompts: tokens/s of reading `--prompt-tokens` tokens until the next one is known.

llama.cpp is called through its C interface. Its drafts are verified by code of this benchmark, which does what
`llama-server --spec-type draft-simple` does: the program itself isn't part of llama-cpp-python. llama.cpp rounds
activations to 8 bits with quantized files, as ours do with `--compute int8`, and keeps keys and values in float16. So
texts differ after some tokens (`llama_cpp_logits.py` shows by how much).
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from arguments import DraftingArguments
from gguf_formats import Format, write_format
from llama_cpp_model import Drafts, LlamaCpp, ModelDrafts, PhraseDrafts, describe_build
from models import LARGE, gguf_file, load_prompts, long_prompts, prepare
from peers import Run, Way, interleave, load_each, our_prompt, our_text, show
from record import environment, processor, write_record
from rich.console import Console

import layerskip
from layerskip.checkpoint.loading.placement import check_compute
from layerskip.errors import InvalidArgumentError

LLAMA = "llama.cpp"
Part = Literal["decoding", "speculation", "prompts"]


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    formats: tuple[Format, ...] = ("bf16", "q8_0", "q4_0", "q4_1", "q4_k_m")
    """What llama.cpp's quantizer makes of the weights; `file`: the model's GGUF file as it is."""
    compute: tuple[str, ...] = ("float32", "int8")
    """How our products are computed: values of the option of `layerskip.load`. One that a format doesn't allow is
    left out there."""
    load: dict[str, str] = field(default_factory=dict)
    """Further options of `layerskip.load` as pairs, such as `cache_dtype bfloat16`."""
    measure: tuple[Part, ...] = ("decoding", "speculation", "prompts")
    """What to measure."""
    prompt_tokens: int = 512
    """Length of the prompts whose reading is measured."""
    num_long_prompts: int = 2
    """Number of these prompts."""
    folder: Path | None = None
    """Where the files are kept; a temporary folder if not given. They take up to 13 bytes a weight."""
    only_files: bool = False
    """Write the files, and measure nothing."""
    json: bool = False
    """Print the record, and nothing else."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    for compute in arguments.compute:
        check_compute(compute, native=True)  # an unknown one is refused before files are written
    torch.set_num_threads(arguments.threads)
    console = Console(quiet=arguments.json, width=130)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)) / Path(arguments.model).stem
        dtype = torch.bfloat16 if arguments.model in LARGE else torch.float32
        model = prepare(
            arguments.model,
            folder / f"exit{arguments.exit_layer}",
            exit_layer=arguments.exit_layer,
            agreement=arguments.agreement,
            dtype=dtype,
        )
        build = describe_build()
        console.print(", ".join(f"{key} {value}" for key, value in build.items()), markup=False)
        console.print(f"{processor()}, {arguments.threads} threads", markup=False)
        formats = {}
        for name in arguments.formats:
            files = find_files(arguments, name, model, folder)
            console.print(f"{files[0]}: {files[0].stat().st_size / 1e6:.1f} MB", markup=False, soft_wrap=True)
            if not arguments.only_files:
                formats[name] = measure(arguments, console, name, model, *files)
    if arguments.only_files:
        return
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "build": build,
        "formats": formats,
    }
    path = write_record(f"vs_llama_cpp-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    console.print(f"record: {path}", markup=False, soft_wrap=True)


def find_files(arguments: Arguments, name: Format, model: str, folder: Path) -> tuple[Path, Path | None]:
    """The file of a format, and that of a model that drafts, if it is asked for."""
    if name == "file":
        file = gguf_file(model)
        if file is None:
            raise InvalidArgumentError(f"{model} is not a GGUF file; leave out --formats file")
    else:
        file = write_format(model, name, folder, arguments.threads)
    if "speculation" not in arguments.measure:
        return file, None
    kind = "q8_0" if name == "file" else name
    return file, write_format(model, kind, folder, arguments.threads, arguments.exit_layer)


def measure(
    arguments: Arguments, console: Console, name: Format, model: str, file: Path, draft_file: Path | None
) -> dict[str, Any]:
    """Measure one format, and print tables; returns what belongs in the record."""
    source = model if name == "file" else str(file)  # by its name, the model has its exit adapters
    ours = dict(load_each(source, arguments.compute, arguments.load, console))
    if not ours:
        raise InvalidArgumentError(f"no --compute of {', '.join(arguments.compute)} can be used with {file}")
    lm = next(iter(ours.values()))
    prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
    texts = long_prompts(lm, arguments.prompts, arguments.num_long_prompts, arguments.prompt_tokens)
    context = max(max(map(len, prompts)) + arguments.max_new_tokens + 16, arguments.prompt_tokens + 8)
    found: dict[str, Any] = {"file_bytes": file.stat().st_size}
    found["bytes_a_token"] = {
        compute: each.decoder.weight_bytes(0, each.config.num_layers) for compute, each in ours.items()
    }
    with closing(LlamaCpp(file, context, arguments.threads)) as theirs:
        if "decoding" in arguments.measure or draft_file is not None:
            ways: dict[str, Way] = {LLAMA: their_text(theirs, arguments.max_new_tokens), **our_plain(arguments, ours)}
            if draft_file is None:
                comparison = interleave(ways, prompts, arguments.repetitions)
            else:
                with closing(LlamaCpp(draft_file, context, arguments.threads)) as drafting:
                    ways |= their_speculation(arguments, theirs, drafting) | our_speculation(arguments, ours)
                    comparison = interleave(ways, prompts, arguments.repetitions)
            show(console, f"{arguments.model}, {name}: decoding", comparison, LLAMA)
            found["decoding"] = comparison.record(LLAMA)
        if "prompts" in arguments.measure:
            ways = {LLAMA: their_prompt(theirs), **{f"ours, {compute}": our_prompt(lm) for compute, lm in ours.items()}}
            comparison = interleave(ways, texts, arguments.repetitions)
            show(console, f"{arguments.model}, {name}: prompts of {arguments.prompt_tokens} tokens", comparison, LLAMA)
            found["prompts"] = comparison.record(LLAMA)
    return found


def their_text(theirs: LlamaCpp, max_new_tokens: int) -> Way:
    """llama.cpp's text, token by token."""

    def run(prompt: list[int]) -> Run:
        tokens, seconds = theirs.write(prompt, max_new_tokens)
        return Run(tokens=tokens, work=len(tokens) - 1, seconds=seconds)

    return run


def their_prompt(theirs: LlamaCpp) -> Way:
    """A prompt in llama.cpp, until its next token."""

    def run(prompt: list[int]) -> Run:
        seconds, token = theirs.read(prompt)
        return Run(tokens=[token], work=len(prompt), seconds=seconds)

    return run


def their_speculation(arguments: Arguments, theirs: LlamaCpp, drafting: LlamaCpp) -> dict[str, Way]:
    """llama.cpp's text with drafts."""

    def way(drafts: Drafts) -> Way:
        def run(prompt: list[int]) -> Run:
            tokens, seconds, _ = theirs.write_with(drafts, prompt, arguments.max_new_tokens, arguments.num_speculations)
            return Run(tokens=tokens, work=len(tokens) - 1, seconds=seconds)

        return run

    exit_layer, most = arguments.exit_layer, arguments.num_speculations
    return {
        f"{LLAMA}, a draft model of {exit_layer} layers": way(ModelDrafts(drafting)),
        f"{LLAMA}, drafts from the text": way(PhraseDrafts(most)),
    }


def our_plain(arguments: Arguments, ours: Mapping[str, layerskip.LanguageModel]) -> dict[str, Way]:
    """Autoregressive decoding in each way to compute."""
    options = {"generation_strategy": "autoregressive"}
    return {f"ours, {compute}": our_text(lm, arguments.max_new_tokens, **options) for compute, lm in ours.items()}


def our_speculation(arguments: Arguments, ours: Mapping[str, layerskip.LanguageModel]) -> dict[str, Way]:
    """Drafts at a fixed exit, and adaptive decoding."""
    fixed: dict[str, Any] = {
        "generation_strategy": "self_speculative",
        "exit_layer": arguments.exit_layer,
        "num_speculations": arguments.num_speculations,
    }
    ways = {}
    for compute, lm in ours.items():
        ways[f"ours, {compute}, drafts at exit {arguments.exit_layer}"] = our_text(
            lm, arguments.max_new_tokens, **fixed
        )
        ways[f"ours, {compute}, adaptive"] = our_text(lm, arguments.max_new_tokens, generation_strategy="adaptive")
    return ways


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
