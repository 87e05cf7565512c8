"""Many clients at once for minutes, some of which hang up: every finished answer is the one given alone, nothing leaks.

    python benchmarks/serving_load.py --seconds 300
    python benchmarks/serving_load.py --seconds 30 --settle 10 --stall-model none

The script starts `layerskip serve demo` and computes the answers to a pool of requests by the library, one at a time:
prompts and answers of mixed lengths, greedy and with a seed. Clients then send requests of the pool, streamed or not;
a third of them hang up in the middle. Checked are: no error, every finished answer equals the expected one, memory
stays within 5 % after the first minute, and at the end no text runs or waits and no file is open that was not before.

The second part serves a model with a long context. While some streams run, a prompt of thousands of tokens is sent, and
the longest gap between two pieces of a stream is compared with the stream's median gap (at most 10 times).
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
import tyro
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table
from serving_process import ServerProcess, layerskip_server

import layerskip
from layerskip.evaluation.load.answer import Answer, AnswerError
from layerskip.evaluation.load.client import Client

LENGTHS = (1, 4, 16, 40, 96, 200)
"""Tokens of answers."""
PROMPT_LENGTHS = (1, 6, 25, 80, 240, 600)
"""Tokens of prompts."""
SAMPLE_SECONDS = 1.0
QUIET_SECONDS = 10.0
"""Seconds that the server gets, after the load, to notice that the last clients have gone."""
MOST_GROWTH, MOST_STALL = 0.05, 10.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "demo"
    clients: int = 32
    seconds: float = 300.0
    settle: float = 60.0
    """Seconds after which memory must stay as it is."""
    pool: int = 60
    """Different requests."""
    leaving: float = 1 / 3
    """Share of requests whose clients hang up."""
    stall_model: str = "smollm2"
    """Model of the second part; none: leave it out."""
    stall_context: int = 8192
    stall_streams: int = 4
    stall_prompt: int = 4000
    """Tokens of the prompt that is read while the streams run."""
    seed: int = 0
    threads: int = 2
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request of the pool, and its answer when it is alone."""

    body: dict[str, Any]
    text: str


@dataclass(kw_only=True)
class Seen:
    """What clients have seen."""

    finished: int = 0
    left: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, bytes."""

    def compare(self, case: Case, text: str) -> None:
        """Count a finished answer."""
        self.finished += 1
        self.tokens += case.body["max_tokens"]
        if text != case.text and len(self.wrong) < 20:
            self.wrong.append({"body": json.dumps(case.body)[:500], "expected": case.text, "got": text})


def make_pool(arguments: Arguments) -> list[Case]:
    """Requests of mixed lengths with the answers of the library."""
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(arguments.model, device="cpu")
    source = (Path(layerskip.__file__).parent / "language_model.py").read_text()
    tokens, pick = lm.encode(source)[0], random.Random(arguments.seed)
    cases = []
    for number in range(arguments.pool):
        size, start = pick.choice(PROMPT_LENGTHS), pick.randrange(len(tokens) - max(PROMPT_LENGTHS))
        prompt = tokens[start : start + size]
        options: dict[str, Any] = {"temperature": 0.0}
        if number % 2:
            options = {"temperature": pick.choice((0.7, 1.0)), "top_p": 0.95, "seed": pick.randrange(2**31)}
        if number % 5 == 4:
            options["stop"] = ["\n\n"]
        length = pick.choice(LENGTHS)
        (result,) = lm.generate([prompt], max_new_tokens=length, **options, do_sample=options["temperature"] > 0)
        cases.append(Case(body={"prompt": prompt, "max_tokens": length, **options}, text=result.text))
    return cases


class Clients:
    """Clients that send requests of a pool again and again."""

    def __init__(self, arguments: Arguments, server: ServerProcess, pool: list[Case]) -> None:
        """Prepare."""
        self._arguments, self._server, self._pool, self.seen = arguments, server, pool, Seen()
        self._began = 0.0

    async def run(self) -> None:
        """Send for as long as was asked for."""
        self._began = time.monotonic()
        address = self._server.address
        async with (
            httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as whole,
            Client(address, timeout=120) as streaming,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._watch())
            for number in range(self._arguments.clients):
                group.create_task(self._client(number, whole, streaming))

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._began + self._arguments.seconds

    async def _watch(self) -> None:
        while not self._over:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.seen.resident.append((time.monotonic() - self._began, self._server.resident_bytes))

    async def _client(self, number: int, whole: httpx.AsyncClient, streaming: Client) -> None:
        pick = random.Random(self._arguments.seed * 1000 + number)
        while not self._over:
            case, stream = pick.choice(self._pool), pick.random() < 0.5
            sending = self._stream(case, streaming) if stream else self._whole(case, whole)
            if pick.random() >= self._arguments.leaving:
                await sending
                continue
            try:  # most answers take longer
                await asyncio.wait_for(sending, pick.uniform(0.005, 0.3))
            except TimeoutError:
                self.seen.left += 1

    async def _whole(self, case: Case, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.post("/v1/completions", json=case.body)
        except httpx.HTTPError as error:
            self.seen.errors[f"{type(error).__name__}: {error}"] += 1
            return
        if answer.status_code != 200:
            self.seen.errors[f"HTTP {answer.status_code}: {answer.text[:200]}"] += 1
            return
        self.seen.compare(case, answer.json()["choices"][0]["text"])

    async def _stream(self, case: Case, client: Client) -> None:
        answer = Answer()
        try:
            await client.send("/v1/completions", {**case.body, "stream": True}, answer)
        except AnswerError as error:
            self.seen.errors[f"{error.kind}: {error}"] += 1
            return
        self.seen.compare(case, answer.text)


def load(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """The first part."""
    pool = make_pool(arguments)
    with layerskip_server(arguments.model, folder / "load.log", threads=arguments.threads) as server:
        files = _quiet_files(server)
        clients = Clients(arguments, server, pool)
        asyncio.run(clients.run())
        seen, idle = clients.seen, _wait_until_idle(server)
        left_open = _quiet_files(server) - files
        ended = server.process.poll()
        log = server.log.read_text()
    settled = [size for seconds, size in seen.resident if seconds >= arguments.settle]
    before = statistics.median(settled[:10]) if settled else None
    growth = None if before is None else max(settled) / before - 1
    checks = {
        "no error": not seen.errors,
        "answers as alone": not seen.wrong,
        "memory flat": growth is not None and growth <= MOST_GROWTH,
        "nothing runs": idle,
        "no file left open": left_open <= 0,
        "no fault in the log": "Traceback" not in log and ended is None,
    }
    return {
        "finished": seen.finished,
        "hung_up": seen.left,
        "errors": dict(seen.errors),
        "wrong": seen.wrong,
        "tokens_per_second": seen.tokens / arguments.seconds,
        "resident_mib": [round(size / 2**20, 1) for _, size in seen.resident],
        "growth": growth,
        "files_left_open": left_open,
        "checks": checks,
    }


def _wait_until_idle(server: ServerProcess) -> bool:
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        if server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0:
            return True
        time.sleep(0.2)
    return False


def _quiet_files(server: ServerProcess) -> int:
    """Open files, once connections that have ended are closed."""
    server.metric("num_requests_running")  # as what is loaded with the first request stays open
    time.sleep(1.0)
    return server.num_files


def stalls(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """The second part."""
    flags = ("--max-model-len", str(arguments.stall_context), "--max-concurrency", str(arguments.stall_streams + 1))
    with layerskip_server(arguments.stall_model, folder / "stalls.log", *flags, threads=arguments.threads) as server:
        times = asyncio.run(_read_while_streaming(arguments, server))
    gaps = [[later - earlier for earlier, later in pairwise(each)] for each in times["streams"]]
    ratios = [max(each) / statistics.median(each) for each in gaps]
    longest = max(range(len(gaps[0])), key=gaps[0].__getitem__)
    return {
        "longest_gap_began_s": times["streams"][0][longest] + times["began"] - times["sent"],
        "first_token_of_the_long_prompt_s": times["long"],
        "gaps_s": gaps,
        "median_gap_s": [statistics.median(each) for each in gaps],
        "longest_gap_s": [max(each) for each in gaps],
        "ratios": ratios,
        "checks": {"no stall": max(ratios) <= MOST_STALL},
    }


async def _read_while_streaming(arguments: Arguments, server: ServerProcess) -> dict[str, Any]:
    pick, body = random.Random(arguments.seed), {"temperature": 0, "ignore_eos": True, "stream": True}
    tokens = 1000  # of which most are written by the time the prompt is read
    async with Client(server.address) as client:
        await client.send("/v1/completions", {**body, "prompt": "Once", "max_tokens": 32}, Answer())  # warms up
        answers = [Answer() for _ in range(arguments.stall_streams)]
        began = time.perf_counter()
        running = [
            asyncio.ensure_future(
                client.send("/v1/completions", {**body, "prompt": f"{n}. A story:", "max_tokens": tokens}, answer)
            )
            for n, answer in enumerate(answers)
        ]
        while min(len(answer.times) for answer in answers) < 20:
            await asyncio.sleep(0.05)
        sent = time.perf_counter()
        prompt, long = [pick.randrange(1000, 20000) for _ in range(arguments.stall_prompt)], Answer()
        await client.send("/v1/completions", {**body, "prompt": prompt, "max_tokens": 4}, long)
        if any(each.done() for each in running):
            print("a stream had ended before the long prompt was read", file=sys.stderr)
        await asyncio.sleep(1.0)
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return {"streams": [answer.times for answer in answers], "long": long.times[0], "began": began, "sent": sent}


def main(arguments: Arguments) -> None:
    """Measure, print and record; exit with 1 where a check fails."""
    with tempfile.TemporaryDirectory() as scratch:
        results = {"load": load(arguments, Path(scratch))} if arguments.seconds > 0 else {}
        if arguments.stall_model != "none":
            results["stalls"] = stalls(arguments, Path(scratch))
    content = {"arguments": asdict(arguments), **results}
    path = write_record("serving_load", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    else:
        _print(results, path)
    sys.exit(0 if all(ok for part in results.values() for ok in part["checks"].values()) else 1)


def _print(results: dict[str, dict[str, Any]], path: Path) -> None:
    console = Console()
    for name, part in results.items():
        table = Table("", "", title=name)
        for key, value in part.items():
            shown = value[:: max(1, len(value) // 8)] if key == "resident_mib" else value
            if key not in ("checks", "gaps_s"):
                table.add_row(key, str(shown))
        for check, ok in part["checks"].items():
            table.add_row(check, "[green]yes[/green]" if ok else "[red]NO[/red]")
        console.print(table)
    console.print(f"{processor()}; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
