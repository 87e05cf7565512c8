"""Generation by an engine of one's own, for what `LanguageModel.generate` leaves no choice in."""

from collections.abc import Sequence
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.event import Event
from layerskip.decoding.request import make_request
from layerskip.decoding.rounds.plain import PREFILL_CHUNK
from layerskip.decoding.rules.constraint import Constraint
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder


def start(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    policy: Any = None,
    constraints: Sequence[Constraint] | None = None,
    prompt_logprobs: int | None = None,
    shares_suffixes: bool = False,
    lease_seconds: float = 0.0,
    **options: Any,
) -> Engine:
    """An engine with a row for each prompt, in their order; as large as these need.

    Args:
        decoder: The network.
        prompts: Token ids.
        config: How to decode.
        seeds: Of each row; the config's, or 0, if not given.
        prefill_chunk: Tokens of each prompt that a step reads at most.
        policy: Plans all rounds.
        constraints: Of each row.
        prompt_logprobs: As for `make_request`.
        shares_suffixes: Whether outputs of rows that have ended draft for others.
        lease_seconds: As for `Engine`; a step is a round of each batch if not given.
        **options: In place of `config`.
    """
    config = config or GenerationConfig(**options)
    seeds = seeds or [config.seed or 0] * len(prompts)
    each = zip(prompts, seeds, constraints or [None] * len(prompts), strict=True)
    requests = [
        make_request(
            decoder, prompt, config, seed=seed, index=i, constraint=constraint, prompt_logprobs=prompt_logprobs
        )
        for i, (prompt, seed, constraint) in enumerate(each)
    ]
    capacity = max(len(request.tokens) + request.max_new_tokens for request in requests)
    engine = Engine(
        decoder,
        max_rows=len(requests),
        capacity=capacity,
        policy=policy,
        prefill_chunk=prefill_chunk,
        shares_suffixes=shares_suffixes,
        lease_seconds=lease_seconds,
    )
    for request in requests:
        engine.add(request)
    return engine


def drain(engine: Engine) -> list[Event]:
    """Step until no rows are left; all that happened."""
    events: list[Event] = []
    while engine.rows:
        events += engine.step()
    return events


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> list[list[int]]:
    """Token ids after each prompt; arguments as for `start`."""
    engine = start(decoder, prompts, *arguments, **options)
    rows = engine.rows
    drain(engine)
    return [row.output for row in rows]


def cache_of(engine: Engine) -> KVCache:
    """The keys and values of all rows."""
    return engine._slots.cache
