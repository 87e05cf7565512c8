"""Time to the first token of a prompt at a server, the first time and after another one that begins alike.

    python benchmarks/serving_prefix.py
    python benchmarks/serving_prefix.py --model smollm2 --prefix-tokens 500 --repetitions 9

Each repetition makes a prefix of random tokens, sends it with one ending (nothing of it is known then), and then with
another. The ratio of both times is taken within a repetition. The text of the second must be the one that the library
writes, which keeps no prefixes there.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table
from serving_process import layerskip_server

import layerskip
from layerskip.evaluation.load.answer import Answer
from layerskip.evaluation.load.client import Client

MOST_RATIO = 0.2


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "smollm2"
    prefix_tokens: int = 500
    ending_tokens: int = 8
    max_tokens: int = 16
    repetitions: int = 9
    threads: int = 2
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two prompts that begin alike."""

    first: list[int]
    second: list[int]


def make_pairs(arguments: Arguments, vocabulary: int) -> list[Pair]:
    """One pair for each repetition, and one that warms up."""
    pick = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [pick.randrange(vocabulary // 10, vocabulary // 2) for _ in range(number)]

    pairs = []
    for _ in range(arguments.repetitions + 1):
        prefix = tokens(arguments.prefix_tokens)
        pairs.append(
            Pair(first=prefix + tokens(arguments.ending_tokens), second=prefix + tokens(arguments.ending_tokens))
        )
    return pairs


async def ask(arguments: Arguments, address: str, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Send each pair's prompts, one after the other."""
    rows = []
    async with Client(address) as client:
        for pair in pairs:
            row: dict[str, Any] = {}
            for name, prompt in (("first", pair.first), ("repeated", pair.second)):
                answer = Answer()
                body = {"prompt": prompt, "max_tokens": arguments.max_tokens, "temperature": 0, "ignore_eos": True}
                options = {"stream": True, "stream_options": {"include_usage": True, "include_drafts": True}}
                await client.send("/v1/completions", {**body, **options}, answer)
                details = answer.usage.get("prompt_tokens_details") or {}
                row[name] = {"seconds": answer.times[0], "text": answer.text, "cached": details.get("cached_tokens")}
            rows.append(row)
    return rows[1:]


def main(arguments: Arguments) -> None:
    """Measure, print and record; exit with 1 where a text differs, or nothing was found again."""
    lm = layerskip.load(arguments.model, device="cpu")
    pairs = make_pairs(arguments, lm.config.vocab_size)
    length = arguments.prefix_tokens + arguments.ending_tokens + arguments.max_tokens
    with tempfile.TemporaryDirectory() as scratch:
        log, flags = Path(scratch) / "server.log", ("--max-model-len", str(max(1024, 2 * length)))
        with layerskip_server(arguments.model, log, *flags, threads=arguments.threads) as server:
            rows = asyncio.run(ask(arguments, server.address, pairs))
    options: dict[str, Any] = {"max_new_tokens": arguments.max_tokens, "do_sample": False, "ignore_eos": True}
    expected = [lm.generate([pair.second], **options)[0].text for pair in pairs[1:]]
    same = sum(row["repeated"]["text"] == text for row, text in zip(rows, expected, strict=True))
    ratios = [row["repeated"]["seconds"] / row["first"]["seconds"] for row in rows]
    found = min(row["repeated"]["cached"] or 0 for row in rows)
    content = {
        "arguments": asdict(arguments),
        "rows": rows,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "same_texts": same,
        "least_cached_tokens": found,
    }
    path = write_record("serving_prefix", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    else:
        _print(arguments, content, path)
    sys.exit(0 if same == len(rows) and found > 0 else 1)


def _print(arguments: Arguments, content: dict[str, Any], path: Path) -> None:
    rows, console = content["rows"], Console()
    table = Table("prompt", "first token after, ms: median (least to most)", title=arguments.model)
    for name in ("first", "repeated"):
        times = [1e3 * row[name]["seconds"] for row in rows]
        table.add_row(name, f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})")
    console.print(table)
    ratios = content["ratios"]
    console.print(
        f"{content['ratio']:.3f} x ({min(ratios):.3f} to {max(ratios):.3f}; bar: {MOST_RATIO}); at least "
        f"{content['least_cached_tokens']} tokens found again; {content['same_texts']} of {len(rows)} texts as without "
        "a server"
    )
    console.print(f"{processor()}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
