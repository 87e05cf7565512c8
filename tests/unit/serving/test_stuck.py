"""A text whose constraint can't go on is an error of its own request."""

import asyncio

import pytest
from constraints import Maze

from layerskip import LanguageModel, load
from layerskip.decoding.config import GenerationConfig
from layerskip.serving.config import ServerConfig
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.options import Wanted
from layerskip.serving.service import Service
from layerskip.serving.ticket import Delivery, JobEnd, JobFailure, Origin

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("demo")


def test_the_client_is_told_and_others_are_answered(lm: LanguageModel) -> None:
    async def run() -> tuple[list[Delivery], list[Delivery]]:
        service = Service.of(lm, ServerConfig(max_concurrency=2, max_model_len=256, cache_memory=1), created=0)
        service.scheduler.start()
        config = GenerationConfig(max_new_tokens=20)
        wanted = Wanted(
            config=config,
            num_choices=1,
            seed=0,
            stream=False,
            include_usage=False,
            include_drafts=False,
            num_logprobs=None,
        )
        (prompt,) = lm.encode("def f(")
        stuck = lm.request(prompt, config, seed=0, constraint=Maze(1, lm.config.vocab_size, fails=5))
        tickets = [
            service.submit([request], wanted, Origin(request_id="x", operation="chat"))
            for request in (stuck, lm.request(prompt, config, seed=0))
        ]
        found = [[delivery async for delivery in ticket.deliveries()] for ticket in tickets]
        service.scheduler.stop()
        return found[0], found[1]

    failed, answered = asyncio.run(run())
    assert isinstance(failed[-1], JobFailure)
    assert isinstance(failed[-1].error, ApiError)
    assert failed[-1].error.status == 400
    assert "after 5 tokens" in failed[-1].error.message
    assert isinstance(answered[-1], JobEnd)
    assert len(answered[-1].result.token_ids) == 20
