"""Reading prompts, and plain decoding: one token a step, the oracle that every other way to decode is compared with.

Shapes: B rows, Q query tokens a row, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from layerskip.decoding.batch import Batch
from layerskip.decoding.policy import RoundResult
from layerskip.decoding.rounds.telling import tell_prompts, tell_tokens
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.model.positions import ValueSource

PREFILL_CHUNK = 1024
"""Tokens of a prompt that are read at once: this bounds the memory of masks and activations."""


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """What follows a prompt."""

    token: int
    logprobs: tuple[TokenLogprobs, ...]
    """Of the token, if the request asks for it."""


@torch.inference_mode()
def read_chunk(batch: Batch, counts: Mapping[int, int]) -> dict[int, FirstToken]:
    """Read the next tokens of the rows' prompts, and choose the first token after prompts that are read to their end.

    Rows that ask for it are told how likely the tokens are that were read.

    Args:
        batch: Rows whose prompts aren't read to their end.
        counts: By row, tokens to read at most. Unless the decoder is `ragged`, rows lie one behind the other.

    Returns:
        The first token after the prompt, by the row's place in the batch; only rows whose prompt has been read.
    """
    places = range(min(counts), max(counts) + 1)
    decoder, cache = batch.decoder, batch.cache.view(places.start, places.stop)
    starts, rows = cache.lengths, batch.rows[places.start : places.stop]
    sizes = [counts.get(place, 0) for place in places]
    unread = [row.tokens[start : start + size] for row, start, size in zip(rows, starts, sizes, strict=True)]
    hidden = decoder.read_rows(unread, cache, batch.depth)
    tell_prompts(decoder, rows, starts, hidden, batch.depth)
    for row, part in enumerate(unread):
        cache.commit(row, len(part))
    done = [i for i, row in enumerate(rows) if unread[i] and starts[i] + len(unread[i]) == len(row.tokens)]
    if not done:
        return {}
    last = torch.stack([hidden[row][-1:] for row in done])
    done_places = [places.start + row for row in done]
    sampler = batch.sampler_of(done_places)
    ready = [rows[row] for row in done]
    first = [len(row.tokens) for row in ready]
    guided = any(row.guide is not None for row in ready)
    if not guided and not sampler.adjusts and all(row.request.config.logprobs is None for row in ready):
        picked = decoder.pick(last, sampler.draw, first, exit_layer=batch.depth)[0].tolist()
        return {
            place: FirstToken(token=token, logprobs=()) for place, (token,) in zip(done_places, picked, strict=True)
        }
    logits = decoder.own_logits(last, batch.depth)
    masks = [[row.guide.at() if row.guide is not None else None] for row in ready] if guided else None
    scores = sampler.scores(logits, [[row.tokens] for row in ready], masks)
    gained = sampler.choose(scores, first).tolist()
    told = tell_tokens(decoder, ready, logits, gained)
    return {
        place: FirstToken(token=token, logprobs=logprobs)
        for place, (token,), logprobs in zip(done_places, gained, told, strict=True)
    }


@torch.inference_mode()
def step(batch: Batch) -> RoundResult:
    """Generate one token in each row, through its logits."""
    decoder, cache, sampler = batch.decoder, batch.cache, batch.sampler
    positions = decoder.place(cache, cache.lengths, 1)
    hidden = decoder.run_layers(decoder.embed(batch.pending()), positions, cache, 0, batch.depth)
    hidden = decoder.adapt(hidden, positions, cache, batch.depth, ValueSource.NONE)
    logits = decoder.own_logits(hidden, batch.depth)
    scores = sampler.scores(logits, batch.contexts(), batch.masks())
    chosen = sampler.choose(scores, [len(row.tokens) for row in batch.rows]).tolist()
    return RoundResult(
        drafts=[()] * batch.num_rows,
        num_accepted=[0] * batch.num_rows,
        tokens=[token for (token,) in chosen],
        logprobs=tell_tokens(decoder, batch.rows, logits, chosen),
    )
