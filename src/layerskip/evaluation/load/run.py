"""Puts a load on a server, and keeps what came of every request as soon as it has ended.

The loop that reads streams does nothing else: samples are written by a thread, so that no disk delays a time. Samples
carry the number of the attempt in which they were made, because an interrupted run goes on later.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter, process_time
from typing import Any

from layerskip.evaluation.load.answer import Answer, AnswerError
from layerskip.evaluation.load.arrivals import poisson_gaps
from layerskip.evaluation.load.client import Client, ServerError
from layerskip.evaluation.load.config import LoadConfig, make_body, path_of
from layerskip.evaluation.load.figures import span_of
from layerskip.evaluation.progress import Progress, ignore_progress
from layerskip.evaluation.samples import SampleStore

Prompt = str | list[dict[str, Any]]
MOST_PATIENCE = 60.0
"""Seconds that a client waits at most before its next request, when the server has asked it to."""
ROUNDED = 6
"""Decimals of times in samples: microseconds."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server under load."""

    url: str
    key: str | None
    model: str
    ours: Mapping[str, Any] | None
    """What a server of this package tells of its model; None of others."""


async def _find(url: str, key: str | None, config: LoadConfig) -> Target:
    async with Client(url, key=key, timeout=config.timeout) as client:
        try:
            entries = await client.models()
        except ServerError:
            if config.model is None or not await _answers(client):
                raise
            entries = []
    name = config.model or str(entries[0]["id"])
    entry = next((entry for entry in entries if entry["id"] == name), {})
    ours = entry.get("layerskip")
    return Target(url=url, key=key, model=name, ours=ours if isinstance(ours, Mapping) else None)


async def _answers(client: Client) -> bool:
    """Whether a server without a list of models is one all the same: it refuses a request without a body."""
    try:
        await client.send("/v1/completions", {}, Answer())
    except AnswerError as error:
        return error.kind in ("HTTP 400", "HTTP 422")
    return True


def find_target(url: str, key: str | None, config: LoadConfig) -> Target:
    """Ask a server for its models.

    Args:
        url: The server's address.
        key: Its key, if it wants one.
        config: The load; may name the model.

    Raises:
        InvalidArgumentError: The address can't be one.
        ServerError: There is no server, it isn't one of OpenAI's protocol, or it wants another key.
    """
    return asyncio.run(_find(url, key, config))


@dataclass(frozen=True, kw_only=True)
class LoadWork:
    """One run."""

    target: Target
    config: LoadConfig
    prompt: Callable[[int], Prompt]
    """The prompt of request I."""


def run_load(work: LoadWork, store: SampleStore, *, on_progress: Progress = ignore_progress) -> float | None:
    """Send all requests that the store doesn't have yet.

    Args:
        work: What to send.
        store: Keeps the outcome of every request, whether it was answered or not.
        on_progress: Told how many are running and how many have ended.

    Returns:
        The share of one core that this client took; None if nothing was left to send.

    Raises:
        ServerError: A request of the warm-up wasn't answered.
        KeyboardInterrupt: Ctrl-C; what has ended is in the store.
    """
    return asyncio.run(_Run(work, store, on_progress).all())


class _Run:
    """The requests of one attempt."""

    def __init__(self, work: LoadWork, store: SampleStore, on_progress: Progress) -> None:
        self._work, self._store, self._on_progress = work, store, on_progress
        self._attempt = 1 + max((int(sample.get("attempt", 0)) for sample in store.samples.values()), default=0)
        self._running = 0
        self._began = 0.0
        limit, seconds = work.config.limit(), work.config.seconds
        self._left = self._indices(limit)
        self._deadline = None if seconds is None else max(0.0, seconds - span_of(list(store.samples.values())))

    def _indices(self, limit: int | None) -> Iterator[int]:
        index = 0
        while limit is None or index < limit:
            if str(index) not in self._store.samples:
                yield index
            index += 1

    def _next(self) -> int | None:
        """Number of the next request; None if there is none, or the time is up."""
        if self._deadline is not None and perf_counter() - self._began >= self._deadline:
            return None
        return next(self._left, None)

    async def all(self) -> float | None:
        config, target = self._work.config, self._work.target
        if self._deadline == 0 or (self._deadline is None and self._is_complete()):
            return None
        async with Client(target.url, key=target.key, timeout=config.timeout) as client:
            for number in range(config.warm_up):
                await self._warm_up(client, number)
            async with self._writer() as write:
                self._began, cpu = perf_counter(), process_time()
                self._tell()
                try:
                    if config.request_rate is not None:
                        await self._arrive(client, write, config.request_rate)
                    else:
                        async with asyncio.TaskGroup() as group:
                            for _ in range(config.concurrency or 1):
                                group.create_task(self._ask_again_and_again(client, write))
                finally:
                    share = (process_time() - cpu) / max(1e-9, perf_counter() - self._began)
        return share

    def _is_complete(self) -> bool:
        limit = self._work.config.limit()
        return limit is not None and all(str(index) in self._store.samples for index in range(limit))

    async def _warm_up(self, client: Client, number: int) -> None:
        """Send a request that isn't counted; its number is one that no counted request has."""
        prompt, config = self._work.prompt(-1 - number), self._work.config
        body = make_body(config, self._work.target.model, prompt, 0)
        try:
            await client.send(path_of(config, prompt), body, Answer())
        except AnswerError as error:
            raise ServerError(
                f"{client.address}{path_of(config, prompt)} didn't answer the first request: {error.kind}: {error}"
            ) from error

    async def _ask_again_and_again(self, client: Client, write: Callable[[int, dict[str, Any]], None]) -> None:
        while (index := self._next()) is not None:
            retry_after = await self._ask(client, write, index)
            if retry_after is not None:
                await asyncio.sleep(min(retry_after, MOST_PATIENCE))

    async def _arrive(self, client: Client, write: Callable[[int, dict[str, Any]], None], rate: float) -> None:
        """Send requests at the times of a Poisson process, counted from the beginning so that delays don't add up."""
        gaps, due = poisson_gaps(rate, self._work.config.seed or 0), 0.0
        async with asyncio.TaskGroup() as group:
            while True:
                due += next(gaps)
                if self._deadline is not None and due >= self._deadline:
                    return
                await asyncio.sleep(max(0.0, self._began + due - perf_counter()))
                index = next(self._left, None)
                if index is None:
                    return
                group.create_task(self._ask(client, write, index))

    async def _ask(self, client: Client, write: Callable[[int, dict[str, Any]], None], index: int) -> float | None:
        """Send one request and keep its sample; the seconds that the server wants to be left alone, if it says so."""
        config, prompt, answer = self._work.config, self._work.prompt(index), Answer()
        body = make_body(config, self._work.target.model, prompt, index)
        failure: AnswerError | None = None
        self._running += 1
        self._tell()
        start = perf_counter() - self._began
        try:
            seconds = await client.send(path_of(config, prompt), body, answer)
        except AnswerError as error:
            failure, seconds = error, perf_counter() - self._began - start
        finally:
            self._running -= 1
        sample = make_sample(answer, prompt, start, seconds, failure)
        write(index, {"index": index, "attempt": self._attempt, **sample})
        return failure.retry_after if failure is not None else None

    def _tell(self) -> None:
        self._on_progress(f"{self._running} running", len(self._store.samples), self._work.config.limit())

    @asynccontextmanager
    async def _writer(self) -> AsyncIterator[Callable[[int, dict[str, Any]], None]]:
        """A function that keeps samples, in a thread; at the end, however it comes, all of them are kept."""
        with ThreadPoolExecutor(1, thread_name_prefix="samples") as thread:
            kept: list[Any] = []

            def write(index: int, sample: dict[str, Any]) -> None:
                kept.append(thread.submit(self._store.add, str(index), sample))
                self._tell()

            yield write
        for each in kept:
            each.result()


def make_sample(
    answer: Answer, prompt: Prompt, start: float, seconds: float, failure: AnswerError | None
) -> dict[str, Any]:
    """What is kept of a request.

    Args:
        answer: What arrived.
        prompt: What was asked.
        start: When it was sent, in seconds after the attempt began.
        seconds: How long it took.
        failure: Why it wasn't answered in full; None if it was.
    """
    times = answer.times
    return {
        "start": round(start, ROUNDED),
        "seconds": round(seconds, ROUNDED),
        "first": round(times[0], ROUNDED) if times else None,
        "gaps": [round(later - earlier, ROUNDED) for earlier, later in pairwise(times)],
        "piece_tokens": answer.tokens_by_piece(),
        "tokens": answer.num_tokens,
        "prompt_tokens": answer.usage.get("prompt_tokens"),
        "finish_reason": answer.finish_reason,
        "speculation": answer.speculation,
        "error": None if failure is None else {"kind": failure.kind, "message": str(failure)},
        "prompt": prompt,
        "text": answer.text,
    }


def prompts_in_turn(prompts: Sequence[Prompt]) -> Callable[[int], Prompt]:
    """The prompts of a data set, from the beginning again when there are more requests."""
    return lambda index: prompts[index % len(prompts)]
