"""What exit adapters bring: acceptance and tokens a round by exit and draft length, and speed against plain decoding.

    python benchmarks/exit_adapters.py --model smollm2 --exit-adapters runs/adapters \\
        --questions gsm8k_test.jsonl --field question --num-prompts 20

Questions go through the model's chat template, and the model answers greedily. All ways to decode run in turn for every
prompt and must write the same tokens. With `--random`, prompts are random tokens, after which drafts fail: there,
adaptive decoding must not be slower than plain steps.
"""

import random
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

import layerskip
from layerskip.decoding.stats import GenerationStats
from layerskip.evaluation.data.prompts import read_prompts

PLAIN, ADAPTIVE = "autoregressive", "adaptive"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "smollm2"
    exit_adapters: str = "auto"
    """Folder of the adapters; auto: those that lie with the model."""
    questions: Path | None = None
    """JSON lines with the questions."""
    field: str = "question"
    skip: int = 0
    """Questions to leave out at the beginning: those that were trained on."""
    random: bool = False
    """Prompts of random tokens instead."""
    num_prompts: int = 20
    lengths: tuple[int, ...] = (1, 2, 3, 4, 6)
    max_new_tokens: int = 128
    repetitions: int = 1
    threads: int = 2
    compute: Literal["float32", "int8", "bfloat16"] = "float32"


@dataclass(kw_only=True)
class Sum:
    """Figures of one way to decode, over all prompts."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    first_drafted: int = 0
    first_accepted: int = 0
    speeds: list[float] = field(default_factory=list)

    def add(self, stats: GenerationStats) -> None:
        """Count one answer; its first token comes with the prompt."""
        seconds = stats.seconds - stats.time_to_first_token_s
        self.tokens += stats.tokens - 1
        self.seconds += seconds
        self.rounds += stats.rounds
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        self.first_drafted += sum(stats.drafted_by_position[:1])
        self.first_accepted += sum(stats.accepted_by_position[:1])
        self.speeds.append((stats.tokens - 1) / seconds if seconds else 0.0)


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    options: dict[str, Any] = {"exit_adapters": arguments.exit_adapters, "compute": arguments.compute}
    lm = layerskip.load(arguments.model, dtype="float32", device="cpu", **options)
    prompts = choose_prompts(arguments, lm)
    sums = measure(arguments, lm, prompts)
    report(lm, sums)
    content = {"arguments": {name: str(value) for name, value in vars(arguments).items()}, "machine": environment()}
    path = write_record("exit_adapters", {**content, "ways": {name: asdict(each) for name, each in sums.items()}})
    print(f"written to {path}")


def choose_prompts(arguments: Arguments, lm: layerskip.LanguageModel) -> list[list[int]]:
    """Token ids of the prompts."""
    if arguments.random or arguments.questions is None:
        pick = random.Random(0)
        return [[pick.randrange(lm.config.vocab_size) for _ in range(60)] for _ in range(arguments.num_prompts)]
    questions = read_prompts(arguments.questions, field=arguments.field, limit=None)[arguments.skip :]
    chosen = questions[: arguments.num_prompts]
    return [lm.encode_chat([{"role": "user", "content": question}]) for question in chosen]


def measure(arguments: Arguments, lm: layerskip.LanguageModel, prompts: list[list[int]]) -> dict[str, Sum]:
    """Decode every prompt in all ways, in turn."""
    ways: dict[str, dict[str, Any]] = {PLAIN: {"generation_strategy": PLAIN}, ADAPTIVE: {}}
    for exit_layer in lm.decoder.adapted_exits:
        for length in arguments.lengths:
            ways[f"exit {exit_layer}, {length}"] = {"exit_layer": exit_layer, "num_speculations": length}
    sums: dict[str, Sum] = defaultdict(Sum)
    for options in ways.values():
        lm.generate([prompts[0]], max_new_tokens=16, ignore_eos=True, **options)  # warms up
    for _ in range(arguments.repetitions):
        for prompt in track(prompts, "prompts"):
            texts = set()
            for name, options in ways.items():
                options = {"max_new_tokens": arguments.max_new_tokens, "ignore_eos": arguments.random, **options}
                (result,) = lm.generate([prompt], **options)
                texts.add(tuple(result.token_ids))
                sums[name].add(result.stats)
            if len(texts) > 1:
                raise SystemExit("the ways wrote different texts")
    return dict(sums)


def report(lm: layerskip.LanguageModel, sums: dict[str, Sum]) -> None:
    """Print a table."""
    plain = sums[PLAIN]
    table = Table(title=f"{lm.checkpoint.name}, {plain.tokens} tokens in {plain.seconds:.1f} s of plain decoding")
    for name in ("way", "first drafts accepted", "drafts accepted", "tokens a round", "tokens/s", "speed", "median"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, each in sums.items():
        speed = each.tokens / each.seconds
        ratios = [ours / theirs for ours, theirs in zip(each.speeds, plain.speeds, strict=True) if theirs]
        table.add_row(
            name,
            f"{each.first_accepted / each.first_drafted:.1%}" if each.first_drafted else "",
            f"{each.accepted / each.drafted:.1%}" if each.drafted else "",
            f"{each.tokens / each.rounds:.2f}",
            f"{speed:.1f}",
            f"{speed * plain.seconds / plain.tokens:.2f}",
            f"{statistics.median(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
