"""The loop of a generation: read the prompts, then step after step until every row has ended.

It knows tokens only; text, stop strings and colours are `text` and `stream`.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.batch import Batch, Round, Row
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.ngram import Match
from layerskip.decoding.policy import FixedPolicy, Outcome, Plan, Policy
from layerskip.decoding.rounds import plain as autoregressive
from layerskip.decoding.rounds import verifying as self_speculative
from layerskip.decoding.rounds.drafting import Draft, draft_early_exit, draft_ngram, draft_nothing
from layerskip.decoding.rounds.verifying import Verification
from layerskip.decoding.sampler import Sampler
from layerskip.decoding.stats import Stopwatch
from layerskip.errors import InvalidArgumentError, PromptError, PromptTooLongError
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """Drafts of one row that are about to be verified."""

    row: Row
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Tokens that became part of a row's text: first accepted drafts, then the target's own token."""

    row: Row
    tokens: tuple[int, ...]
    num_accepted: int
    num_drafted: int


def default_exit_layer(num_layers: int) -> int:
    """The exit used for drafting where none is named: a quarter of the layers."""
    return max(1, num_layers // 4)


def choose_exit_layer(config: GenerationConfig, decoder: Decoder) -> int:
    """The exit that a config means on this network, checked.

    Raises:
        InvalidArgumentError: `exit_layer` is outside 1..L.
    """
    if config.exit_layer is not None:
        return decoder.config.check_exit_layer(config.exit_layer)
    return default_exit_layer(decoder.num_layers) if config.speculates else decoder.num_layers


def make_policy(
    config: GenerationConfig, decoder: Decoder, num_rows: int, experience: Experience | None = None
) -> Policy:
    """The policy that a config asks for, on this network; `adaptive` starts from what is known of the network."""
    match config.strategy:
        case "adaptive":
            return (experience or Experience()).policy(
                decoder,
                num_rows,
                samples=config.samples,
                exit_layer=config.exit_layer,
                most_drafts=config.num_speculations,
            )
        case "ngram":
            return FixedPolicy(fixed=Plan(drafter="ngram", num_speculations=config.draft_length))
        case _:
            exit_layer = choose_exit_layer(config, decoder)
            return FixedPolicy(
                fixed=Plan(drafter="early_exit", exit_layer=exit_layer, num_speculations=config.draft_length)
            )


def check_prompt(tokens: Sequence[int], config: GenerationConfig, decoder: Decoder, index: int = 0) -> int:
    """Tokens that may be written after a prompt: `max_new_tokens`, or what the context leaves.

    Raises:
        PromptError: The prompt is empty, has ids outside the vocabulary, or leaves no room.
    """
    if not tokens:
        raise PromptError(f"prompt {index} is empty; give at least one token")
    decoder.config.check_token_ids(tokens, f"prompt {index}")
    room = decoder.max_context - len(tokens)
    if room < 1:
        raise PromptTooLongError(
            f"prompt {index} has {len(tokens)} tokens, and the context of {decoder.max_context} must hold it and at "
            "least one new token; shorten the prompt (max_context at loading sets the context, up to the model's own)"
        )
    return min(config.max_new_tokens, room)


def make_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int] = (),
    end_tokens: Sequence[Sequence[int]] | None = None,
    seed: int,
    cache: KVCache | None = None,
    policy: Policy | None = None,
    experience: Experience | None = None,
) -> Batch:
    """Rows for prompts, with a cache of their own or one that holds a prefix of each already.

    Args:
        decoder: The network.
        prompts: Token ids of each prompt.
        config: How to decode.
        eos_token_ids: Tokens that end every text, for a config that names none.
        end_tokens: The same, but for each prompt its own.
        seed: Seed of every row.
        cache: Holds the first `cache.lengths[b]` tokens of prompt b, at most all but one; a new one if not given.
        policy: Plans the rounds; that of the config if not given.
        experience: What adaptive decoding knows of the network, and adds to.

    Raises:
        PromptError: A prompt that can't be continued.
        InvalidArgumentError: No prompts, or an exit layer that the network doesn't have.
        OutOfMemoryError: The cache doesn't fit.
    """
    if not prompts:
        raise InvalidArgumentError("no prompts were given; give at least one")
    choose_exit_layer(config, decoder)
    room = [check_prompt(prompt, config, decoder, index) for index, prompt in enumerate(prompts)]
    capacity = max(len(prompt) + new for prompt, new in zip(prompts, room, strict=True))
    cache = cache or decoder.new_cache(len(prompts), capacity)
    rows = [
        Row(
            index=i,
            tokens=list(prompt),
            prompt_length=len(prompt),
            max_new_tokens=room[i],
            seed=seed,
            eos_token_ids=_ends(config, eos_token_ids if end_tokens is None else end_tokens[i]),
        )
        for i, prompt in enumerate(prompts)
    ]
    for row, length in zip(rows, cache.lengths, strict=True):
        row.recorder.cached_tokens = length
    return Batch(
        decoder=decoder,
        cache=cache,
        rows=rows,
        config=config,
        sampler=Sampler(config),
        stopwatch=Stopwatch(decoder.device),
        policy=policy or make_policy(config, decoder, len(prompts), experience),
    )


def _ends(config: GenerationConfig, otherwise: Sequence[int]) -> frozenset[int]:
    """Tokens that end a text: those of the config, if it names any."""
    if config.ignore_eos:
        return frozenset()
    return frozenset(otherwise if config.eos_token_ids is None else config.eos_token_ids)


def decode(batch: Batch, *, show_drafts: bool = False) -> Iterator[Drafted | Committed]:
    """Write all rows to their ends, telling what happens.

    A caller may end a row itself by `Row.finish` before it asks for the next event.

    Args:
        batch: From `make_batch`; empty when the iterator ends.
        show_drafts: Tell drafts before they are verified, which waits for the device once more a round.
    """
    speculates = batch.config.speculates
    depth = batch.decoder.num_layers if speculates else choose_exit_layer(batch.config, batch.decoder)
    for row in batch.rows:
        row.recorder.start()
    calls = batch.decoder.layer_calls
    rounds = autoregressive.prefill(batch, depth)
    yield from _commit(batch, rounds, calls, first=True)
    while batch.rows:
        if not speculates:
            yield from _take_step(batch, depth)
        elif steps := batch.policy.rests():
            yield from _rest(batch, steps)
        else:
            calls = batch.decoder.layer_calls
            rounds = yield from _speculate(batch, show_drafts)
            yield from _commit(batch, rounds, calls)


def _take_step(batch: Batch, depth: int) -> Generator[Committed, None, float | None]:
    """One token for each row; returns the seconds it took, or None where the same step will take less later."""
    calls, provisional, started = batch.decoder.layer_calls, batch.decoder.provisional_rounds, time.perf_counter()
    rounds = autoregressive.step(batch, depth)
    seconds = time.perf_counter() - started
    typical = batch.decoder.provisional_rounds == provisional
    yield from _commit(batch, rounds, calls)
    return seconds if typical else None


def _rest(batch: Batch, steps: int) -> Iterator[Committed]:
    """Steps that the policy needn't plan."""
    seconds: list[float] = []
    for _ in range(steps):
        if not batch.rows:
            break
        taken = yield from _take_step(batch, batch.decoder.num_layers)
        seconds += [] if taken is None else [taken]
    batch.policy.observe_rest(seconds)


def _speculate(batch: Batch, show_drafts: bool) -> Generator[Drafted, None, list[Round]]:
    """One round, as the policy plans it; returns its `Round`s."""
    policy, provisional, started = batch.policy, batch.decoder.provisional_rounds, time.perf_counter()
    matches = [row.ngrams.match() for row in batch.rows] if policy.uses_ngrams else []
    plan = policy.plan(matches, max(row.remaining for row in batch.rows))
    exits = policy.exits if policy.probes else ()
    if plan.drafter == "none" and not exits and not batch.by_distribution:
        verification = Verification(rounds=autoregressive.step(batch, batch.decoder.num_layers))
        policy.observe(plan, matches, _outcome(verification, time.perf_counter() - started))
        return verification.rounds
    whole = None if show_drafts or exits else _whole_round(batch, plan)
    confidences: list[list[float]] = []
    away = 0.0
    if whole is not None:
        verification = whole
    else:
        mark = batch.stopwatch.mark
        start, draft, middle = mark(), _draft(batch, plan, matches, exits), mark()
        confidences = draft.confidences
        if show_drafts:
            away = time.perf_counter()
            yield from _drafted(batch, draft)
            away = time.perf_counter() - away
        resumed, verification, end = mark(), self_speculative.verify(batch, draft, exits), mark()
        _record(batch, batch.stopwatch.between(start, middle), batch.stopwatch.between(resumed, end))
    outcome = _outcome(
        verification,
        time.perf_counter() - started - away,
        confidences,
        typical=batch.decoder.provisional_rounds == provisional,
    )
    if whole is not None:
        _record(batch, *_shares(plan, batch, outcome.seconds))
    policy.observe(plan, matches, outcome)
    return verification.rounds


def _drafted(batch: Batch, draft: Draft) -> Iterator[Drafted]:
    for row, tokens, usable in zip(batch.rows, draft.tokens.tolist(), draft.num_drafts, strict=True):
        yield Drafted(row=row, tokens=tuple(tokens[:usable]))


def _record(batch: Batch, drafting: float, verifying: float) -> None:
    for row in batch.rows:
        row.recorder.seconds_drafting += drafting
        row.recorder.seconds_verifying += verifying


def _outcome(
    verification: Verification,
    seconds: float,
    confidences: Sequence[Sequence[float]] = (),
    *,
    typical: bool = True,
) -> Outcome:
    rounds = verification.rounds
    return Outcome(
        seconds=seconds,
        held=[round_.num_accepted for round_ in rounds],
        drafted=[len(round_.drafts) for round_ in rounds],
        tokens=[(*round_.drafts[: round_.num_accepted], round_.token) for round_ in rounds],
        typical=typical,
        confidences=confidences,
        agreement=verification.agreement,
    )


def _whole_round(batch: Batch, plan: Plan) -> Verification | None:
    """The plan's round in one call, where the network has compiled it."""
    if plan.drafter == "ngram" or plan.stop is not None:  # their drafts are as many as a round happens to find
        return None
    drafts = plan.num_speculations if plan.drafter == "early_exit" else 0
    return self_speculative.whole_round(batch, plan.exit_layer, drafts)


def _shares(plan: Plan, batch: Batch, seconds: float) -> tuple[float, float]:
    """A whole round's seconds, split between drafting and verification as they enter layers.

    Nothing between them can be timed: a graph is one call.
    """
    drafting = (plan.num_speculations + 1) * plan.exit_layer
    verifying = batch.decoder.num_layers - plan.exit_layer
    share = drafting / (drafting + verifying)
    return share * seconds, (1 - share) * seconds


def _draft(batch: Batch, plan: Plan, matches: Sequence[Match | None], exits: tuple[int, ...]) -> Draft:
    match plan.drafter:
        case "early_exit":
            return draft_early_exit(batch, plan.exit_layer, plan.num_speculations, exits, plan.stop)
        case "ngram":
            return draft_ngram(batch, matches, plan.num_speculations)
        case _:
            return draft_nothing(batch)


def _commit(batch: Batch, rounds: list[Round], calls_before: int, *, first: bool = False) -> Iterator[Committed]:
    """Extend the rows by a step's tokens, end those that are done, and drop them."""
    calls = batch.decoder.layer_calls - calls_before
    for row, result in zip(list(batch.rows), rounds, strict=True):
        tokens = (*result.drafts[: result.num_accepted], result.token)
        stop = next((i for i, token in enumerate(tokens) if token in row.eos_token_ids), None)
        kept = tokens if stop is None else tokens[: stop + 1]
        num_accepted = min(result.num_accepted, len(kept))
        row.round_start = len(row.tokens)
        row.tokens += kept
        row.recorder.layer_calls += calls
        row.recorder.record_tokens()
        if not first:
            row.recorder.record_round(len(result.drafts), num_accepted)
        if stop is not None:
            row.finish("stop", kept[-1])
        elif row.remaining == 0:
            row.finish("length")
        yield Committed(row=row, tokens=kept, num_accepted=num_accepted, num_drafted=len(result.drafts))
    for position, row in enumerate(batch.rows):  # texts that were cut short: forget what lies beyond their end
        batch.cache.rollback(position, min(batch.cache.lengths[position], len(row.tokens) - 1))
    batch.drop_finished()
