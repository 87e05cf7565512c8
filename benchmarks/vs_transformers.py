"""Speed against transformers on the same checkpoint: greedy, batch 1, one run with everything interleaved.

    python benchmarks/vs_transformers.py --model demo
    python benchmarks/vs_transformers.py --model 240m --num-speculations 6
    python benchmarks/vs_transformers.py --model smollm2 --dtype bfloat16
    python benchmarks/vs_transformers.py --model smollm2 --measure prompts --compute float32 int8 --torch bfloat16

`240m` is a random Llama of 16 layers, width 1024 and vocabulary 32,000 (238M parameters to read for each token). Each
repetition runs everything one after the other on every prompt; ratios are medians of the ratios within a repetition.

- decoding: transformers and ours, autoregressive and with drafts at an exit (`assistant_early_exit` there). In float32
  all must generate the same tokens; `same texts` says whether they do. Prompts count, on both sides.
- prompts: reading `--prompt-tokens` tokens until the next one is known; transformers computes logits for the last token
  only, and fills a cache, as ours does.

Weights of transformers have the type `--dtype`, and its products the same. Ours are native kernels in each
`--compute` (with weights that bfloat16 holds exactly kept in it), and torch's in each type of `--torch`.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from arguments import DraftingArguments
from models import load_prompts, long_prompts, prepare
from peers import Run, Way, interleave, load_each, our_prompt, our_text, show
from record import environment, processor, write_record
from rich.console import Console

import layerskip
from layerskip.checkpoint.loading.placement import check_compute
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.errors import InvalidArgumentError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    num_prompts: int = 6
    dtype: tuple[DType, ...] = ("float32",)
    """Types of transformers' weights; ratios are to the first."""
    caches: tuple[Literal["dynamic", "static"], ...] = ("dynamic",)
    """transformers' caches in autoregressive decoding; the first must be dynamic, its default and the faster one on a
    CPU."""
    compute: tuple[str, ...] = ("float32",)
    """How our native kernels multiply: values of the option of `layerskip.load`."""
    torch: tuple[DType, ...] = ()
    """Types in which our torch network is measured too."""
    load: dict[str, str] = field(default_factory=dict)
    """Further options of `layerskip.load` for the native kernels as pairs, such as `quantize int8`."""
    measure: tuple[Literal["decoding", "prompts"], ...] = ("decoding", "prompts")
    """What to measure."""
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
    console.print(f"{processor()}, {arguments.threads} threads", markup=False)
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(arguments.model, Path(scratch), exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        content = measure(arguments, console, model)
    path = write_record(f"vs_transformers-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    console.print(f"record: {path}", markup=False, soft_wrap=True)


def measure(arguments: Arguments, console: Console, model: str) -> dict[str, Any]:
    """Run everything in turn, and print tables; returns the record."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours = load_ours(arguments, console, model)
    lm = next(iter(ours.values()))
    theirs = {
        f"transformers, {name}": load_transformers_model(lm.checkpoint, getattr(torch, name)).eval()
        for name in arguments.dtype
    }
    reference = next(iter(theirs))
    record: dict[str, Any] = {"arguments": json.loads(json.dumps(asdict(arguments), default=str))}
    record["reference"] = reference
    if "decoding" in arguments.measure:
        prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
        decoding = interleave(text_ways(arguments, theirs, ours), prompts, arguments.repetitions)
        title = f"{arguments.model}, decoding: exit {arguments.exit_layer}, {arguments.num_speculations} drafts"
        show(console, title, decoding, reference)
        accepted = {name: acceptance(arguments, each, prompts) for name, each in ours.items()}
        console.print("accepted drafts: " + ", ".join(f"{name} {rate:.3f}" for name, rate in accepted.items()))
        record |= {"decoding": decoding.record(reference), "acceptance": accepted}
    if "prompts" in arguments.measure:
        texts = long_prompts(lm, arguments.prompts, arguments.num_long_prompts, arguments.prompt_tokens)
        ways = {name: their_prompt(each) for name, each in theirs.items()}
        ways |= {name: our_prompt(each) for name, each in ours.items()}
        reading = interleave(ways, texts, arguments.repetitions)
        show(console, f"{arguments.model}, prompts of {arguments.prompt_tokens} tokens", reading, reference)
        record["prompts"] = reading.record(reference)
    return record


def load_ours(arguments: Arguments, console: Console, model: str) -> dict[str, layerskip.LanguageModel]:
    """The model with native kernels in each way to compute, and in torch in each type."""
    found = load_each(model, arguments.compute, arguments.load, console)
    ours = {f"ours, {name}": lm for name, lm in found}
    for name in arguments.torch:
        ours[f"ours, torch {name}"] = layerskip.load(model, dtype=name, device="cpu", kernels="torch")
    if not ours:
        raise InvalidArgumentError(f"no --compute of {', '.join(arguments.compute)} can be used with {model}")
    return ours


def text_ways(
    arguments: Arguments, theirs: Mapping[str, Any], ours: Mapping[str, layerskip.LanguageModel]
) -> dict[str, Way]:
    """Autoregressive decoding, and drafts at an exit."""
    early = {
        "assistant_early_exit": arguments.exit_layer,
        "num_assistant_tokens": arguments.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    fixed: dict[str, Any] = {
        "generation_strategy": "self_speculative",
        "exit_layer": arguments.exit_layer,
        "num_speculations": arguments.num_speculations,
    }
    most = arguments.max_new_tokens
    ways: dict[str, Way] = {}
    for name, model in theirs.items():
        for cache in arguments.caches:
            label = name if cache == "dynamic" else f"{name}, {cache} cache"
            ways[label] = their_text(model, most, cache_implementation=cache)
        ways[f"{name}, assistant_early_exit"] = their_text(model, most, **early)
    for name, lm in ours.items():
        ways[name] = our_text(lm, most, with_prompt=True, generation_strategy="autoregressive")
        ways[f"{name}, self-speculative"] = our_text(lm, most, with_prompt=True, **fixed)
    return ways


def their_text(model: Any, max_new_tokens: int, **options: Any) -> Way:
    """transformers' text, past its end, with the prompt's time."""

    def run(prompt: list[int]) -> Run:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        seconds = time.perf_counter() - start
        tokens = out[0, len(prompt) :].tolist()
        return Run(tokens=tokens, work=len(tokens), seconds=seconds)

    return run


def their_prompt(model: Any) -> Way:
    """A prompt in transformers, until its next token."""

    @torch.inference_mode()
    def run(prompt: list[int]) -> Run:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        token = int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return Run(tokens=[token], work=len(prompt), seconds=time.perf_counter() - start)

    return run


def acceptance(arguments: Arguments, lm: layerskip.LanguageModel, prompts: list[list[int]]) -> float:
    """Share of drafts that are accepted."""
    results = [
        lm.generate(
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            ignore_eos=True,
            exit_layer=arguments.exit_layer,
            num_speculations=arguments.num_speculations,
        )[0]
        for prompt in prompts
    ]
    return sum(r.stats.accepted for r in results) / sum(r.stats.drafted for r in results)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
