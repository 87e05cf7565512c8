"""Adaptive decoding against every fixed exit and draft length, on texts where it pays and where nothing does.

    python benchmarks/adaptive.py --prompts human_eval.jsonl --num-prompts 40     # the embedded model, the whole grid
    python benchmarks/adaptive.py --model untrained --temperature 1               # random weights: nothing to gain
    python benchmarks/adaptive.py --copy                                          # the text repeats itself

Batch 1, all ways in turn for every prompt; the figures are tokens over seconds after each prompt's first token.
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
from record import environment, write_record
from rich.console import Console
from rich.progress import track
from synthetic import encode_prompts, make_untrained, random_prompts

import layerskip

AUTOREGRESSIVE, ADAPTIVE, NGRAM = "autoregressive", "adaptive", "ngram"
CONTEXT_TOKENS = 600
"""Most tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "demo"
    """demo, untrained (random weights in its shape), a folder or a hub id."""
    exits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    max_new_tokens: int = 128
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    """JSON lines with a field `prompt`; the untrained model gets random tokens instead."""
    num_prompts: int = 6
    copy: bool = False
    """One prompt instead: a file of some sixty lines, and the beginning of an edited copy."""
    temperature: float = 0.0
    """Above 0, sample: text that doesn't repeat itself. The seed is the same for all ways, and so is the text."""
    repetitions: int = 3
    threads: int = 2


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model == "untrained":
            make_untrained(Path(scratch), layerskip.load("demo").checkpoint.folder)
        lm = layerskip.load(scratch if arguments.model == "untrained" else arguments.model, dtype="float32")
        prompts = load_prompts(arguments, lm)
        speeds = measure(arguments, lm, prompts)
    report(arguments, speeds)


def load_prompts(arguments: Arguments, lm: layerskip.LanguageModel) -> list[list[int]]:
    """Token ids."""
    if arguments.copy:
        return lm.encode([copying_prompt()])
    if arguments.model == "untrained":
        return random_prompts(lm.config.vocab_size, arguments.num_prompts)
    return [prompt[-CONTEXT_TOKENS:] for prompt in encode_prompts(arguments.prompts, arguments.num_prompts, lm.encode)]


def copying_prompt() -> str:
    """Sixty lines of code, and five of a copy in which the class has another name."""
    names = ("width", "height", "depth", "weight", "colour", "label", "origin", "price", "stock")
    methods = [
        f"    def get_{name}(self):\n        if self.{name} is None:\n            raise ValueError('{name}')\n"
        f"        return self.{name}\n\n    def set_{name}(self, value):\n        self.{name} = value\n"
        for name in names
    ]
    body = "\n".join(methods)
    return f"class Item:\n{body}\n\nclass Product:\n{methods[0]}\n    def get_height(self):\n"


def settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Options of each way."""
    ways: dict[str, dict[str, Any]] = {
        name: {"generation_strategy": name} for name in (AUTOREGRESSIVE, ADAPTIVE, NGRAM)
    }
    for exit_layer in arguments.exits:
        for length in arguments.lengths:
            ways[f"exit {exit_layer}, {length} drafts"] = {"exit_layer": exit_layer, "num_speculations": length}
    return ways


def measure(arguments: Arguments, lm: layerskip.LanguageModel, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Tokens/s of each way in each repetition."""
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
    """Print the best ways and the ratios, and write the record."""
    console = Console(width=110)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    fixed = [name for name in medians if name not in (AUTOREGRESSIVE, ADAPTIVE, NGRAM)]
    best = max(fixed, key=medians.__getitem__)
    for name in sorted(medians, key=medians.__getitem__, reverse=True)[:8]:
        console.print(f"{medians[name]:8.1f} tokens/s  {name}")
    console.print(f"{medians[AUTOREGRESSIVE]:8.1f} tokens/s  {AUTOREGRESSIVE}")

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    ratios = {
        "adaptive / best fixed": ratio(ADAPTIVE, best),
        "adaptive / autoregressive": ratio(ADAPTIVE, AUTOREGRESSIVE),
        "ngram / best fixed": ratio(NGRAM, best),
        "best fixed / autoregressive": ratio(best, AUTOREGRESSIVE),
    }
    console.print(f"best fixed: {best}")
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
