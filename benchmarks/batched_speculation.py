"""Tokens per second of an engine with 1, 4, 16 rows that are always busy, with and without speculation, side by side.

    python benchmarks/batched_speculation.py --model smollm2
    python benchmarks/batched_speculation.py --model smollm2 --compute int8 --rows 1 4 --ways autoregressive 2:1

Each way answers the same questions in a closed loop: when a row ends, the next question takes its place. `decoding`
counts the steps in which all rows generate, `all` every step, the reading of prompts included. Ways are interleaved,
and ratios are of neighbouring runs; the first round of runs only warms up.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.request import make_request
from layerskip.errors import TokenizerError

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tom has 12 apples. He gives a third of them to Anna and buys 5 more. How many does he have now?",
    "Explain in simple words why the sky is blue.",
    "List five healthy breakfast ideas.",
    "Write a Python class for a stack with push, pop and peek.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short story about a robot that learns to paint.",
    "Summarize what photosynthesis does.",
    "How do I sort a dictionary by value in Python?",
    "A shirt costs 20 dollars and is reduced by 25 percent. What does it cost now?",
    "What are the main causes of the French Revolution?",
    "Write a function that checks whether a text is a palindrome.",
    "How does a refrigerator work?",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "smollm2"
    rows: tuple[int, ...] = (1, 4, 16)
    ways: tuple[str, ...] = ("autoregressive", "adaptive")
    """`autoregressive`, `adaptive`, `ngram`, or an exit and a number of drafts, such as 2:1."""
    max_new_tokens: int = 96
    requests: int = 2
    """Requests for each row; for a single row at least four."""
    repetitions: int = 4
    compute: Literal["float32", "int8", "bfloat16"] = "float32"
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu`: processor time, for a machine that others use at the same time; with one thread only, as threads that wait
    for each other take some too. Adaptive decoding then times its rounds by it as well."""


@dataclass(frozen=True)
class Run:
    """What one way took."""

    decoding: float
    """Tokens/s while all rows generate."""
    all: float
    """Tokens/s from the first request to the last token."""
    tokens_per_round: float
    texts: tuple[tuple[int, ...], ...]


def config_of(way: str, max_new_tokens: int) -> GenerationConfig:
    """How a way decodes."""
    options: dict[str, Any] = {"generation_strategy": way}
    if ":" in way:
        exit_layer, drafts = map(int, way.split(":"))
        options = {"exit_layer": exit_layer, "num_speculations": drafts}
    return GenerationConfig(max_new_tokens=max_new_tokens, **options)


def prompts_of(lm: layerskip.LanguageModel) -> list[list[int]]:
    """The questions, as chats where the model has a template."""
    try:
        return [lm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    except TokenizerError:
        return lm.encode([f'def answer():\n    """{question}"""\n' for question in QUESTIONS])


def run(lm: layerskip.LanguageModel, way: str, rows: int, prompts: list[list[int]], max_new_tokens: int) -> Run:
    """Answer all prompts with so many rows at once."""
    config = config_of(way, max_new_tokens)
    ends = lm.checkpoint.eos_token_ids
    requests = [make_request(lm.decoder, prompt, config, seed=0, eos_token_ids=ends) for prompt in prompts]
    capacity = max(len(request.tokens) + request.max_new_tokens for request in requests)
    engine = Engine(lm.decoder, max_rows=rows, capacity=capacity, experience=lm._experience)
    waiting, answered = requests[::-1], []
    started, full_tokens, full_seconds, gained, rounds = time.perf_counter(), 0, 0.0, 0, 0
    while waiting or engine.rows:
        while waiting and engine.free_rows:
            answered.append(engine.add(waiting.pop()))
        full = len(engine.rows) == rows and all(row.output for row in engine.rows)
        step_started = time.perf_counter()
        events = engine.step()
        tokens = sum(len(event.tokens) for event in events)
        gained += tokens
        if full:
            full_seconds += time.perf_counter() - step_started
            full_tokens += tokens
            rounds += len(events)
    return Run(
        decoding=full_tokens / full_seconds,
        all=gained / (time.perf_counter() - started),
        tokens_per_round=full_tokens / rounds,
        texts=tuple(tuple(row.output) for row in answered),
    )


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    if arguments.clock == "cpu":
        time.perf_counter = time.process_time
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(arguments.model, device="cpu", compute=arguments.compute)
    questions = prompts_of(lm)
    runs: dict[tuple[int, str], list[Run]] = {}
    for repetition in range(arguments.repetitions + 1):
        for rows in arguments.rows:
            number = max(4, rows * arguments.requests)
            prompts = [questions[(i + repetition) % len(questions)] for i in range(number)]
            for way in arguments.ways:
                runs.setdefault((rows, way), []).append(run(lm, way, rows, prompts, arguments.max_new_tokens))
            assert len({runs[rows, way][-1].texts for way in arguments.ways}) == 1, "the texts differ"
    table = Table(title=f"{arguments.model}, {arguments.compute}, {arguments.clock} clock: medians")
    for column in ("rows", "way", "tokens/s decoding", "ratio", "tokens/s all", "ratio", "x one row", "tokens a round"):
        table.add_column(column, justify="left" if column == "way" else "right")
    record = []
    for (rows, way), each in runs.items():
        plain, alone = runs[rows, arguments.ways[0]], runs[arguments.rows[0], way]

        def median(name: str, base: list[Run] | None = None, each: list[Run] = each) -> float:
            values = [getattr(run, name) for run in each[1:]]
            if base is not None:
                values = [value / getattr(other, name) for value, other in zip(values, base[1:], strict=True)]
            return statistics.median(values)

        line = {
            "rows": rows,
            "way": way,
            "decoding": median("decoding"),
            "decoding_ratio": median("decoding", plain),
            "all": median("all"),
            "all_ratio": median("all", plain),
            "times_one_row": median("all", alone),
            "tokens_per_round": median("tokens_per_round"),
        }
        record.append(line)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in line.values()))
    console = Console()
    console.print(table)
    path = write_record("batched_speculation", {"arguments": vars(arguments), "lines": record})
    machine = environment()
    console.print(f"{machine['cpu']}, {machine['kernels']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
