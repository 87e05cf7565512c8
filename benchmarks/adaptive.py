"""Adaptive decoding against every fixed exit layer and draft length, on texts where drafts help and where none do.

    python benchmarks/adaptive.py --prompts human_eval.jsonl --num-prompts 40     # the embedded model, the whole grid
    python benchmarks/adaptive.py --model untrained --temperature 1               # random weights: nothing to gain
    python benchmarks/adaptive.py --copy                                          # the text repeats itself

Batch 1, all strategies interleaved for every prompt; speeds are tokens / seconds after each prompt's first token.
"""

import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arguments import PromptArguments
from models import load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.progress import track

import layerskip

AUTOREGRESSIVE, ADAPTIVE, NGRAM, EXIT = "autoregressive", "adaptive", "ngram", "exit"
CLASS = """class Item:
    def __init__(self, name, value):
        self.name = name
        self.value = value

    def get_name(self):
        return self.name

    def set_name(self, name):
        self.name = name

    def get_value(self):
        return self.value

    def set_value(self, value):
        self.value = value

    def clear(self):
        self.name = None
        self.value = None

    def copy(self):
        return Item(self.name, self.value)

    def __eq__(self, other):
        return self.name == other.name

    def __repr__(self):
        return self.name
"""
CONTEXT_TOKENS = 600
"""Tokens of a prompt, at most; earlier ones are cut off."""


@dataclass(frozen=True, kw_only=True)
class Arguments(PromptArguments):
    """Options of the benchmark."""

    exits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    ngram_lengths: tuple[int, ...] = (4, 8, 12)
    max_new_tokens: int = 128
    num_prompts: int = 6
    copy: bool = False
    """Use a single prompt: sixty lines of code that repeats itself."""
    temperature: float = 0.0
    """Above 0, sample, so that the text doesn't repeat itself. All strategies have the same seed and generate the same
    text."""
    repetitions: int = 3


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        lm = layerskip.load(prepare(arguments.model, Path(scratch)), dtype="float32")
        prompts = choose_prompts(arguments, lm)
        speeds = measure(arguments, lm, prompts)
    report(arguments, speeds)


def choose_prompts(arguments: Arguments, lm: layerskip.LanguageModel) -> list[list[int]]:
    """Token ids of the prompts."""
    if arguments.copy:
        return [repeating_prompt(lm)]
    return [prompt[-CONTEXT_TOKENS:] for prompt in load_prompts(lm, arguments.prompts, arguments.num_prompts)]


def repeating_prompt(lm: layerskip.LanguageModel) -> list[int]:
    """A class that the model continues up to some sixty lines: method after method, each much like the last."""
    start = lm.encode([CLASS])[0]
    greedy: dict[str, Any] = {"generation_strategy": AUTOREGRESSIVE, "temperature": 0, "ignore_eos": True}
    return start + lm.generate([start], max_new_tokens=400 - len(start), **greedy)[0].token_ids


def settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Options of each strategy."""
    ways: dict[str, dict[str, Any]] = {name: {"generation_strategy": name} for name in (AUTOREGRESSIVE, ADAPTIVE)}
    for length in arguments.ngram_lengths:
        ways[f"{NGRAM}, {length} drafts"] = {"generation_strategy": NGRAM, "num_speculations": length}
    for exit_layer in arguments.exits:
        for length in arguments.lengths:
            ways[f"{EXIT} {exit_layer}, {length} drafts"] = {"exit_layer": exit_layer, "num_speculations": length}
    return ways


def measure(arguments: Arguments, lm: layerskip.LanguageModel, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Tokens/s of each strategy in each repetition."""
    ways = settings(arguments)
    speeds: dict[str, list[float]] = defaultdict(list)
    for repetition in track(range(arguments.repetitions + 1), "repetitions"):
        tokens, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
        for prompt in prompts[: 1 if repetition == 0 else None]:  # the first warms up
            texts = set()
            for name, options in ways.items():
                result = lm.generate(
                    [prompt],
                    max_new_tokens=arguments.max_new_tokens,
                    temperature=arguments.temperature,
                    do_sample=arguments.temperature > 0,
                    seed=0,
                    ignore_eos=True,
                    **options,
                )[0]
                texts.add(tuple(result.token_ids))
                tokens[name] += result.stats.tokens - 1
                seconds[name] += result.stats.seconds - result.stats.time_to_first_token_s
            if len(texts) > 1:
                raise SystemExit("the ways wrote different texts")
        for name in ways if repetition else ():
            speeds[name].append(tokens[name] / seconds[name])
    return dict(speeds)


def report(arguments: Arguments, speeds: dict[str, list[float]]) -> None:
    """Print the best strategies and the ratios, and write the record."""
    console = Console(width=110)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best, ngram = (
        max((name for name in medians if name.startswith(kind)), key=medians.__getitem__) for kind in (EXIT, NGRAM)
    )
    for name in sorted(medians, key=medians.__getitem__, reverse=True)[:8]:
        console.print(f"{medians[name]:8.1f} tokens/s  {name}")
    console.print(f"{medians[AUTOREGRESSIVE]:8.1f} tokens/s  {AUTOREGRESSIVE}")

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    ratios = {
        "adaptive / best fixed": ratio(ADAPTIVE, best),
        "adaptive / autoregressive": ratio(ADAPTIVE, AUTOREGRESSIVE),
        "best ngram / best fixed": ratio(ngram, best),
        "best fixed / autoregressive": ratio(best, AUTOREGRESSIVE),
    }
    console.print(f"best fixed: {best}; best ngram: {ngram}")
    for name, value in ratios.items():
        console.print(f"{name}: {value:.3f}")
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "tokens_per_second": speeds,
        "best_fixed": best,
        "ratios": ratios,
    }
    kind = "copy" if arguments.copy else Path(arguments.model).name
    console.print(
        f"{environment()['cpu']}, {arguments.threads} threads; record: {write_record(f'adaptive-{kind}', content)}"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
