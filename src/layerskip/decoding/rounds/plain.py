"""Reading prompts, and plain decoding: one token a step, the oracle that every other way to decode is compared with.

Shapes: B rows, Q query tokens a row, D width, V vocabulary.
"""

import torch

from layerskip.decoding.batch import Batch
from layerskip.decoding.policy import RoundResult
from layerskip.model.positions import ValueSource

PREFILL_CHUNK = 1024
"""Tokens of a prompt that are read at once: this bounds the memory of masks and activations."""


@torch.inference_mode()
def read_chunk(batch: Batch, chunk: int = PREFILL_CHUNK, places: range | None = None) -> dict[int, int]:
    """Read the next tokens of the rows' prompts, and choose the first token after prompts that are read to their end.

    Rows are padded on the right: what padding writes lies beyond a row's length, is never attended to, and is
    overwritten by the tokens that come.

    Args:
        batch: Rows whose prompts aren't read to their end.
        chunk: Tokens of each row to read at most.
        places: The rows to read, one behind the other; all if not given.

    Returns:
        The first token after the prompt, by the row's place in the batch; only rows whose prompt has been read.
    """
    places = range(batch.num_rows) if places is None else places
    decoder, cache = batch.decoder, batch.cache.view(places.start, places.stop)
    starts, rows = cache.lengths, batch.rows[places.start : places.stop]
    unread = [row.tokens[start : start + chunk] for row, start in zip(rows, starts, strict=True)]
    size = max(map(len, unread))
    tokens = torch.tensor([part + [0] * (size - len(part)) for part in unread], device=decoder.device)
    positions = decoder.place(cache, starts, size)
    hidden = decoder.run_layers(decoder.embed(tokens), positions, cache, 0, batch.depth)
    hidden = decoder.adapt(hidden, positions, cache, batch.depth, ValueSource.NONE)
    for row, part in enumerate(unread):
        cache.commit(row, len(part))
    done = [i for i, row in enumerate(rows) if starts[i] + len(unread[i]) == len(row.tokens)]
    if not done:
        return {}
    last = torch.stack([hidden[row, len(unread[row]) - 1] for row in done]).unsqueeze(1)
    done_places = [places.start + row for row in done]
    sampler = batch.sampler_of(done_places)
    first = [len(rows[row].tokens) for row in done]
    if sampler.needs_context:
        scores = sampler.scores(decoder.own_logits(last, batch.depth), [[rows[row].tokens] for row in done])
        chosen = sampler.choose(scores, first)
    else:
        chosen, _ = decoder.pick(last, sampler.draw, first, exit_layer=batch.depth)
    return {place: token for place, (token,) in zip(done_places, chosen.tolist(), strict=True)}


@torch.inference_mode()
def step(batch: Batch) -> RoundResult:
    """Generate one token in each row, and commit the token before it."""
    decoder, cache, sampler = batch.decoder, batch.cache, batch.sampler
    if sampler.needs_context:
        pending = batch.pending()
        positions = decoder.place(cache, cache.lengths, 1)
        hidden = decoder.run_layers(decoder.embed(pending), positions, cache, 0, batch.depth)
        hidden = decoder.adapt(hidden, positions, cache, batch.depth, ValueSource.NONE)
        scores = sampler.scores(decoder.own_logits(hidden, batch.depth), batch.contexts())
        chosen = sampler.choose(scores, [len(row.tokens) for row in batch.rows]).tolist()
    else:
        chosen = decoder.round(batch.last_tokens, cache, batch.step_request, batch.depth).targets
    for row in range(batch.num_rows):
        cache.commit(row, 1)
    return RoundResult(
        drafts=[()] * batch.num_rows, num_accepted=[0] * batch.num_rows, tokens=[token for (token,) in chosen]
    )
