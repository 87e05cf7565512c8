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
def read_chunk(batch: Batch, chunk: int = PREFILL_CHUNK) -> dict[int, int]:
    """Read the next tokens of the rows' prompts, and choose the first token after prompts that are read to their end.

    Rows are padded on the right: what padding writes lies beyond a row's length, is never attended to, and is
    overwritten by the tokens that come.

    Args:
        batch: Rows whose prompts aren't read to their end.
        chunk: Tokens of each row to read at most.

    Returns:
        The first token after the prompt, by the row's place in the batch; only rows whose prompt has been read.
    """
    decoder, cache = batch.decoder, batch.cache
    starts = cache.lengths
    unread = [row.tokens[start : start + chunk] for row, start in zip(batch.rows, starts, strict=True)]
    size = max(map(len, unread))
    tokens = torch.tensor([part + [0] * (size - len(part)) for part in unread], device=decoder.device)
    positions = decoder.place(cache, starts, size)
    hidden = decoder.run_layers(decoder.embed(tokens), positions, cache, 0, batch.depth)
    hidden = decoder.adapt(hidden, positions, cache, batch.depth, ValueSource.NONE)
    for row, part in enumerate(unread):
        cache.commit(row, len(part))
    done = [i for i, row in enumerate(batch.rows) if starts[i] + len(unread[i]) == len(row.tokens)]
    if not done:
        return {}
    last = torch.stack([hidden[row, len(unread[row]) - 1] for row in done]).unsqueeze(1)
    sampler = batch.sampler_of(done)
    rows = [batch.rows[row] for row in done]
    first = [len(row.tokens) for row in rows]
    if sampler.needs_context:
        scores = sampler.scores(decoder.own_logits(last, batch.depth), [[row.tokens] for row in rows])
        chosen = sampler.choose(scores, first)
    else:
        chosen, _ = decoder.pick(last, sampler.draw, first, exit_layer=batch.depth)
    return {row: token for row, (token,) in zip(done, chosen.tolist(), strict=True)}


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
        tokens = sampler.choose(scores, [len(row.tokens) for row in batch.rows]).flatten().tolist()
    else:
        targets = decoder.round(batch.last_tokens, cache, batch.step_request, batch.depth).targets
        tokens = [token for (token,) in targets]
    for row in range(batch.num_rows):
        cache.commit(row, 1)
    return RoundResult(drafts=[()] * batch.num_rows, num_accepted=[0] * batch.num_rows, tokens=tokens)
