"""Tokens/s of a server with speculation, without it, and of llama.cpp's server, for several numbers of clients.

    python benchmarks/serving_throughput.py
    python benchmarks/serving_throughput.py --clients 1 4 --rounds 5 --llama-cpp

Speculation is switched off in the requests (`generation_strategy: autoregressive`). Both ways have a server of their
own all the same: one would draft from the other's answers to the same prompts, and find their prefixes. llama.cpp's
server is llama-cpp-python's (pip install 'llama-cpp-python[server]') with the same GGUF file and as many threads. In
each round every server takes the same prompts with every number of clients, one after the other, and ratios are taken
within a round; other work on the machine then disturbs all of them alike. No prompt comes twice. All requests are
greedy; speculation must not change any text.
"""

import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from models import gguf_file
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table
from serving_process import layerskip_server, llama_cpp_server

from layerskip.evaluation.load.config import LoadConfig
from layerskip.evaluation.load.figures import summarize
from layerskip.evaluation.load.run import LoadWork, Target, find_target, prompts_in_turn, run_load
from layerskip.evaluation.samples import SampleStore

ON, OFF, LLAMA = "speculation", "autoregressive", "llama.cpp"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    prompts: Path
    """JSON lines with questions, which are sent as chats."""
    model: str = "smollm2"
    """A name, a folder or a GGUF file; llama.cpp's server needs a GGUF file, as smollm2 is one."""
    compute: str | None = None
    """As for our server: int8, or the numbers of the dtype if not given."""
    cache_dtype: str | None = None
    """As for our server: the type of keys and values."""
    field: str = "question"
    clients: Sequence[int] = (1, 4, 16)
    requests_per_client: int = 2
    """Requests of each client in a round; at least 4 in all."""
    max_tokens: int = 128
    rounds: int = 5
    llama_cpp: bool = False
    """Measure llama.cpp's server too."""
    llama_clients: Sequence[int] = (1, 4)
    """Numbers of clients for it; its server answers one request at a time."""
    endpoint: str = "chat"
    """chat, or completions: models without a chat template."""
    extra: str = "{}"
    """JSON of more fields for requests with speculation."""
    threads: int = 2
    json: bool = False
    """Print JSON instead of tables."""


class Throughput:
    """Measures servers in turn."""

    def __init__(self, arguments: Arguments, targets: dict[str, tuple[Target, dict[str, Any]]]) -> None:
        """Prepare.

        Args:
            arguments: Options.
            targets: By way: the server, and more fields of its requests.
        """
        self._arguments, self._targets = arguments, targets
        lines = arguments.prompts.read_text("utf-8").splitlines()
        self._unseen = iter(dict.fromkeys(str(json.loads(line)[arguments.field]) for line in lines))
        self.speeds: dict[int, dict[str, list[float]]] = {}
        self.acceptance: dict[int, list[float | None]] = {}
        self.problems: list[str] = []
        self._texts: dict[str, dict[str, str]] = {}

    def run(self) -> None:
        """All rounds; the first warms up and isn't counted."""
        for number in range(self._arguments.rounds + 1):
            for clients in self._arguments.clients:
                prompts = self._next_prompts(max(4, clients * self._arguments.requests_per_client))
                for way in self._order(number):
                    if way != LLAMA or clients in self._arguments.llama_clients:
                        self._measure(way, clients, number, prompts)

    def _order(self, number: int) -> list[str]:
        """The ways, each of them first in its turn."""
        ways = list(self._targets)
        return ways[number % len(ways) :] + ways[: number % len(ways)]

    def _next_prompts(self, count: int) -> list[str]:
        """Prompts that no server has seen."""
        taken = [next(self._unseen, None) for _ in range(count)]
        if None in taken:
            raise SystemExit(f"{self._arguments.prompts} has too few prompts; give fewer rounds or another file")
        return [prompt for prompt in taken if prompt is not None]

    def _measure(self, way: str, clients: int, number: int, prompts: list[str]) -> None:
        target, extra = self._targets[way]
        count = len(prompts)
        config = LoadConfig(
            endpoint=self._arguments.endpoint,  # type: ignore[arg-type]
            max_tokens=self._arguments.max_tokens,
            concurrency=clients,
            num_requests=count,
            warm_up=0,
            extra_body=json.dumps(extra),
        )
        store = SampleStore()
        run_load(LoadWork(target=target, config=config, prompt=prompts_in_turn(prompts)), store)
        samples = list(store.samples.values())
        self.problems += [f"{way}, {clients} clients: {s['error']}" for s in samples if s["error"]]
        texts = self._texts.setdefault(way, {})
        texts.update({s["prompt"]: s["text"] for s in samples if s["error"] is None})
        if number:
            found = summarize(samples)
            at = self.speeds.setdefault(clients, {})
            at.setdefault(way, []).append(found["output_tokens_per_second"])
            if way == ON and found["speculation"]:
                self.acceptance.setdefault(clients, []).append(found["speculation"]["mean_acceptance_length"])

    def same_texts(self, way: str) -> tuple[int, int]:
        """Texts of a way that are those of our server without speculation, and all."""
        expected, got = self._texts[OFF], self._texts.get(way, {})
        common = [prompt for prompt in got if prompt in expected]
        return sum(got[prompt] == expected[prompt] for prompt in common), len(common)

    def ratios(self) -> dict[str, list[float]]:
        """Ratios of each round."""
        found: dict[str, list[float]] = {}
        for clients, at in self.speeds.items():
            for over in (OFF, LLAMA):
                if over in at:
                    found[f"{ON} / {over}, {clients} clients"] = _divide(at[ON], at[over])
        least, most = min(self.speeds), max(self.speeds)
        for way in (ON, OFF):
            name = f"{most} clients / {least}, {way}"
            found[name] = _divide(self.speeds[most][way], self.speeds[least][way])
        return found


def _divide(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def main(arguments: Arguments) -> None:
    """Measure, print and record; exit with 1 where speculation has changed a text, or a request failed."""
    with contextlib.ExitStack() as servers:
        folder = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        most = str(max(arguments.clients))
        flags = ("--max-concurrency", most, "--max-model-len", "1024")
        if arguments.compute is not None:
            flags = (*flags, "--compute", arguments.compute)
        if arguments.cache_dtype is not None:
            flags = (*flags, "--cache-dtype", arguments.cache_dtype)
        targets = {}
        for way, extra in ((ON, json.loads(arguments.extra)), (OFF, {"generation_strategy": OFF})):
            log, threads = folder / f"{way}.log", arguments.threads
            ours = servers.enter_context(layerskip_server(arguments.model, log, *flags, threads=threads))
            targets[way] = (find_target(ours.address, None, LoadConfig()), extra)
        if arguments.llama_cpp:
            file = gguf_file(arguments.model)
            if file is None:
                raise SystemExit(f"{arguments.model} is no GGUF file, which llama.cpp's server needs")
            theirs = servers.enter_context(
                llama_cpp_server(file, folder / "llama.log", context=1024, threads=arguments.threads)
            )
            targets[LLAMA] = (find_target(theirs.address, None, LoadConfig()), {"repeat_penalty": 1.0})
        measured = Throughput(arguments, targets)
        measured.run()
    report(arguments, measured, list(targets))


def report(arguments: Arguments, measured: Throughput, ways: list[str]) -> None:
    """Print, record and exit."""
    ratios = measured.ratios()
    same, of = measured.same_texts(ON)
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "tokens_per_second": measured.speeds,
        "mean_acceptance_length": measured.acceptance,
        "ratios": {name: {"median": statistics.median(each), "rounds": each} for name, each in ratios.items()},
        "same_texts": {way: measured.same_texts(way) for way in ways},
        "problems": measured.problems,
    }
    path = write_record("serving_throughput", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    else:
        _print(arguments, measured, ratios, ways, path)
    sys.exit(0 if same == of and not measured.problems else 1)


def _print(
    arguments: Arguments, measured: Throughput, ratios: dict[str, list[float]], ways: list[str], path: Path
) -> None:
    console = Console()
    table = Table("clients", *ways, title=f"{arguments.model}: tokens/s, median (least to most)")
    for clients, at in measured.speeds.items():
        table.add_row(str(clients), *(_span(at[way], 1) if way in at else "" for way in ways))
    console.print(table)
    table = Table("ratio", "median (least to most)")
    for name, each in ratios.items():
        table.add_row(name, _span(each, 2))
    console.print(table)
    for way in ways:
        same, of = measured.same_texts(way)
        console.print(f"{way}: {same} of {of} texts are those without speculation")
    for problem in measured.problems[:10]:
        console.print(f"[red]{problem}[/red]")
    console.print(f"{processor()}, {arguments.threads} threads; record: {path}")


def _span(values: list[float], digits: int) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
