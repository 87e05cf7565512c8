"""The scheduler on a real engine, driven without HTTP."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from layerskip import LanguageModel, load
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.errors import NotFiniteError
from layerskip.model.native.library import load_library
from layerskip.serving.observer import Observer
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.scheduler import Scheduler
from layerskip.serving.ticket import Job, JobEnd, JobFailure, Origin, RoundPiece, Ticket

PROMPTS = ("def add(a, b):", "import os", "class A:", "for i in")
ORIGIN = Origin(request_id="x", operation="text_completion")


class Seen(Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rounds: list[RoundPiece] = []

    def gained(self, job: Job, pieces: Sequence[RoundPiece]) -> None:
        self.rounds += pieces

    def ended(self, job: Job, end: JobEnd) -> None:
        self.told.append("ended")

    def cancelled(self, ticket: Ticket) -> None:
        self.told.append("cancelled")

    def failed(self, ticket: Ticket, error: Exception) -> None:
        self.told.append("failed")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("demo")


@pytest.fixture
def scheduler(lm: LanguageModel) -> Any:
    made = Scheduler(lambda: lm.new_engine(max_rows=2, capacity=600), lm.text_tokenizer, max_queue=3, observer=Seen())
    made.start()
    yield made
    made.stop()


def ticket(lm: LanguageModel, prompts: Sequence[str], timeout: float = 60, **options: Any) -> Ticket:
    config = GenerationConfig(**{"max_new_tokens": 24, **options})
    requests = [lm.request(lm.encode(prompt)[0], config, seed=config.seed or 0) for prompt in prompts]
    return Ticket.of(requests, ORIGIN, timeout=timeout)


async def outcome(given: Ticket) -> tuple[dict[int, str], dict[int, JobEnd], list[Exception]]:
    """Texts as pieces, ends and failures."""
    texts: dict[int, str] = {}
    ends: dict[int, JobEnd] = {}
    failures: list[Exception] = []
    async for delivery in given.deliveries():
        match delivery:
            case RoundPiece(place=place, text=text):
                texts[place] = texts.get(place, "") + text
            case JobEnd(place=place, text=text):
                texts[place] += text
                ends[place] = delivery
            case JobFailure(error=error):
                failures.append(error)
    return texts, ends, failures


def test_more_texts_than_rows_are_those_of_the_library(lm: LanguageModel, scheduler: Scheduler) -> None:
    async def run() -> list[tuple[dict[int, str], dict[int, JobEnd], list[Exception]]]:
        tickets = [ticket(lm, PROMPTS), ticket(lm, PROMPTS[:1], seed=5, temperature=0.9)]
        for each in tickets:
            scheduler.submit(each)
        return [await outcome(each) for each in tickets]

    (texts, ends, failures), (sampled, _, _) = asyncio.run(run())
    results = lm.generate(list(PROMPTS), max_new_tokens=24)
    assert failures == []
    assert [texts[place] for place in range(4)] == [result.text for result in results]
    assert [ends[place].result.token_ids for place in range(4)] == [result.token_ids for result in results]
    assert sampled[0] == lm.generate(PROMPTS[0], max_new_tokens=24, seed=5, temperature=0.9)[0].text
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_tickets == 0


@pytest.mark.skipif(load_library() is None, reason="several rounds in a step need the compiled kernels")
def test_a_step_of_several_rounds_is_one_piece_unless_drafts_are_shown(lm: LanguageModel, scheduler: Scheduler) -> None:
    """All of them are there at the same moment; drafts are of single rounds, and so is what is counted."""
    told = scheduler._observer.rounds  # type: ignore[attr-defined]

    async def run(show_drafts: bool) -> tuple[list[RoundPiece], int]:
        fixed = {"generation_strategy": "self_speculative", "exit_layer": 4, "num_speculations": 2}
        given = replace(ticket(lm, PROMPTS[:1], max_new_tokens=120, ignore_eos=True, **fixed), show_drafts=show_drafts)
        given.jobs[0].ticket = given
        told.clear()
        scheduler.submit(given)
        pieces = [piece async for piece in given.deliveries() if isinstance(piece, RoundPiece)]
        return pieces, len(told)

    together, rounds = asyncio.run(run(show_drafts=False))
    apart, num_pieces = asyncio.run(run(show_drafts=True))
    assert len(together) < len(apart) == num_pieces == rounds
    assert "".join(piece.text for piece in together) == "".join(piece.text for piece in apart)
    ids = [[token.token_id for piece in pieces for token in piece.tokens] for pieces in (together, apart)]
    assert ids[0] == ids[1] == lm.generate(PROMPTS[0], max_new_tokens=120, ignore_eos=True)[0].token_ids
    assert sum(len(piece.drafts) for piece in apart) > 60
    assert any(piece.num_accepted for piece in apart)


def test_cancelled_tickets_make_room_within_a_round(lm: LanguageModel, scheduler: Scheduler) -> None:
    async def run() -> float:
        long = ticket(lm, PROMPTS[:2], max_new_tokens=500, ignore_eos=True)
        waiting = ticket(lm, PROMPTS[:1], max_new_tokens=500, ignore_eos=True)
        scheduler.submit(long)
        scheduler.submit(waiting)
        await anext(long.deliveries())
        scheduler.cancel(waiting)
        scheduler.cancel(long)
        scheduler.cancel(long)
        started = time.monotonic()
        short = ticket(lm, PROMPTS[2:3], max_new_tokens=1)
        scheduler.submit(short)
        _, ends, _ = await outcome(short)
        assert len(ends) == 1
        scheduler.cancel(short)  # has ended
        return time.monotonic() - started

    assert asyncio.run(run()) < 1
    assert scheduler.num_tickets == 0
    assert sorted(scheduler._observer.told) == ["cancelled", "cancelled", "ended"]  # type: ignore[attr-defined]


def test_a_full_queue_and_a_scheduler_that_stops_refuse(lm: LanguageModel, scheduler: Scheduler) -> None:
    async def run() -> None:
        running = [ticket(lm, PROMPTS[:1], max_new_tokens=500, ignore_eos=True) for _ in range(2)]
        for each in running:
            scheduler.submit(each)
        for each in running:
            await anext(each.deliveries())
        for _ in range(3):
            scheduler.submit(ticket(lm, PROMPTS[:1]))
        with pytest.raises(ApiError, match="3 requests wait") as full:
            scheduler.submit(ticket(lm, PROMPTS[:1]))
        assert full.value.status == 503
        assert "Retry-After" in full.value.headers
        scheduler.drain()
        assert not scheduler.is_ready
        with pytest.raises(ApiError, match="shutting down"):
            scheduler.submit(ticket(lm, PROMPTS[:1]))
        scheduler.stop()
        for each in running:
            _, _, (error,) = await outcome(each)
            assert isinstance(error, ApiError)
            assert error.code == "shutting_down"

    asyncio.run(run())


def test_late_tickets_are_given_up(lm: LanguageModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.serving.scheduler.CHECK_SECONDS", 0.01)

    async def run() -> list[Exception]:
        late = ticket(lm, PROMPTS[:3], timeout=0.05, max_new_tokens=550, ignore_eos=True)
        scheduler.submit(late)
        return (await outcome(late))[2]

    failures = asyncio.run(run())
    assert failures
    assert all(isinstance(error, ApiError) and error.status == 504 for error in failures)


def test_a_step_that_fails_ends_what_runs_and_the_rest_is_served(
    lm: LanguageModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = [0], Engine.step

    def failing(engine: Engine) -> Any:
        steps[0] += 1
        if steps[0] == 4:
            raise NotFiniteError("the logits are not finite")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)

    async def run() -> tuple[list[Exception], dict[int, str]]:
        first, second = ticket(lm, PROMPTS[:2], max_new_tokens=200), ticket(lm, PROMPTS[2:3])
        scheduler.submit(first)
        scheduler.submit(second)
        return (await outcome(first))[2], (await outcome(second))[0]

    failures, texts = asyncio.run(run())
    assert [error.status for error in failures if isinstance(error, ApiError)] == [500, 500]
    assert texts[0] == lm.generate(PROMPTS[2], max_new_tokens=24)[0].text
    assert scheduler.num_tickets == 0


def test_requests_that_come_and_go_while_the_engine_looks_at_them(
    lm: LanguageModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread goes through collections that others add to."""
    monkeypatch.setattr("layerskip.serving.scheduler.CHECK_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "_max_queue", 400)
    monkeypatch.setattr(Ticket, "is_late", property(lambda _: bool(time.sleep(0))))  # lets another thread run

    async def run() -> int:
        answered = 0
        for number in range(10):
            tickets = [ticket(lm, PROMPTS[:1], max_new_tokens=20) for _ in range(60)]
            for place, each in enumerate(tickets):
                scheduler.submit(each)
                if place % 3 == number % 3:
                    scheduler.cancel(each)
                await asyncio.sleep(0)
            last = tickets[(number + 1) % 3 :: 3][-1]
            answered += len((await outcome(last))[1])
        return answered

    assert asyncio.run(asyncio.wait_for(run(), 120)) == 10
    assert scheduler.is_ready


def test_a_request_that_does_not_fit_fails_alone(lm: LanguageModel, scheduler: Scheduler) -> None:
    async def run() -> tuple[list[Exception], dict[int, JobEnd]]:
        large, small = ticket(lm, PROMPTS[:1], max_new_tokens=900), ticket(lm, PROMPTS[:1])
        scheduler.submit(large)
        scheduler.submit(small)
        return (await outcome(large))[2], (await outcome(small))[1]

    failures, ends = asyncio.run(run())
    assert len(failures) == len(ends) == 1
    assert "doesn't fit a row" in str(failures[0])
