"""How fast the first answers of a process are, when nothing has been measured on this machine before.

    python benchmarks/first_answers.py --model smollm2
    python benchmarks/first_answers.py --model demo --prompts 8 --exits 2 3 --lengths 2 4

Each way to decode runs in a process of its own with an empty cache of costs, one after another, and again. All must
write the same tokens. What counts is the time of all answers, beside that of plain decoding in the same repetition.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro
from record import environment, write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

PLAIN = "autoregressive"
QUESTIONS = (
    "What is the capital of France? Please answer in one full sentence.",
    "Explain in a few sentences why the sky is blue during the day.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A shop sells pens for 3 dollars each. How much do 7 pens cost, and how much change is left from 50 dollars?",
    "List five tips for someone who wants to learn to cook at home.",
)
PROMPTS = ("def add(a, b):\n", "class Stack:\n", "import os\n\n", "for i in range(10):\n", "def read(path):\n")
"""For models without a chat template."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "smollm2"
    exits: tuple[int, ...] = (2,)
    """Exits of the fixed settings."""
    lengths: tuple[int, ...] = (1, 2, 3)
    """Drafts a round of the fixed settings."""
    max_new_tokens: int = 128
    repetitions: int = 3
    threads: int = 2
    compute: Literal["float32", "int8", "bfloat16"] = "float32"
    kept_costs: bool = False
    """Let each way keep its cache of costs from one repetition to the next."""
    way: str | None = None
    """JSON with the options of one way: print its figures as JSON and end."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    if arguments.way is not None:
        print(json.dumps(answer(arguments, json.loads(arguments.way))))
        return
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for repetition in track(range(arguments.repetitions), "repetitions"):
            for number, (name, options) in enumerate(ways(arguments).items()):
                cache = f"{folder}/{number}" if arguments.kept_costs else f"{folder}/{number}-{repetition}"
                runs[name].append(run(arguments, options, cache))
            if len({json.dumps(each[-1]["tokens"]) for each in runs.values()}) > 1:
                raise SystemExit("the ways wrote different texts")
    report(arguments, runs)
    content = {"arguments": asdict(arguments), "machine": environment()}
    print(write_record("first_answers", {**content, "ways": runs}))


def ways(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Options by name."""
    found: dict[str, dict[str, Any]] = {PLAIN: {"generation_strategy": PLAIN}, "adaptive": {}}
    if arguments.model == "smollm2":
        found["adaptive, no adapters"] = {"exit_adapters": None}
    for exit_layer in arguments.exits:
        for length in arguments.lengths:
            found[f"exit {exit_layer}, {length}"] = {"exit_layer": exit_layer, "num_speculations": length}
    return found


def run(arguments: Arguments, options: dict[str, Any], cache: str) -> dict[str, Any]:
    """Figures of one way in a process of its own."""
    kept = ["--model", arguments.model, "--threads", str(arguments.threads), "--compute", arguments.compute]
    argv = [*kept, "--max-new-tokens", str(arguments.max_new_tokens), "--way", json.dumps(options)]
    variables = {**os.environ, "LAYERSKIP_CACHE": cache}
    done = subprocess.run([sys.executable, __file__, *argv], env=variables, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def answer(arguments: Arguments, options: dict[str, Any]) -> dict[str, Any]:
    """Answer all questions."""
    import torch

    import layerskip

    torch.set_num_threads(arguments.threads)
    adapters = options.pop("exit_adapters", "auto")
    lm = layerskip.load(
        arguments.model, exit_adapters=adapters, dtype="float32", device="cpu", compute=arguments.compute
    )
    chats = lm.tokenizer.chat_template is not None
    seconds, tokens = [], []
    for question in QUESTIONS if chats else PROMPTS:
        prompt = lm.encode_chat([{"role": "user", "content": question}]) if chats else question
        (result,) = lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, **options)
        seconds.append(result.stats.seconds)
        tokens.append(list(result.token_ids))
    return {"seconds": seconds, "tokens": tokens}


def report(arguments: Arguments, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table: speed beside plain decoding, median and range over the repetitions, and by question."""
    table = Table(title=f"{arguments.model}: first answers of a process")
    for name in ("way", "s", "speed", "lowest", "highest", "by answer"):
        table.add_column(name, justify="left" if name == "way" else "right")
    plain = [each["seconds"] for each in runs[PLAIN]]
    for name, each in runs.items():
        seconds = [one["seconds"] for one in each]
        speeds = sorted(sum(theirs) / sum(ours) for ours, theirs in zip(seconds, plain, strict=True))
        answers = [
            statistics.median(theirs[i] / ours[i] for ours, theirs in zip(seconds, plain, strict=True))
            for i in range(len(plain[0]))
        ]
        figures = (statistics.median(speeds), speeds[0], speeds[-1])
        total = statistics.median(sum(each) for each in seconds)
        table.add_row(
            name, f"{total:.2f}", *(f"{one:.2f}" for one in figures), " ".join(f"{one:.2f}" for one in answers)
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
