"""Plain decoding, one token a step: the oracle that everything else is held against. Also reads prompts.

Shapes: B rows, Q query tokens a row, D width, V vocabulary.
"""

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch, Round

PREFILL_CHUNK = 1024
"""Prompt tokens a row to read at once: bounds the memory of masks and activations."""


@torch.inference_mode()
def prefill(batch: Batch, num_layers: int) -> list[Round]:
    """Read what the cache doesn't hold of each row's prompt and choose its first token.

    Args:
        batch: Rows that hold their prompts only.
        num_layers: Layers to run: all, or for early exit the first few.
    """
    hidden = read_prompts(batch, num_layers)
    tokens = _choose(batch, batch.decoder.unembed(hidden))
    return [batch.round(token) for (token,) in tokens.tolist()]


@torch.inference_mode()
def step(batch: Batch, num_layers: int) -> list[Round]:
    """Write one token in each row.

    Args:
        batch: Rows with one token each that isn't in the cache yet.
        num_layers: Layers to run: all, or for early exit the first few.
    """
    decoder, cache = batch.decoder, batch.cache
    whole = decoder.round_greedy(batch.last_tokens, cache, 0, 0, num_layers) if batch.greedy else None
    tokens = None if whole is None else whole.targets
    if tokens is None:
        tokens = _next_tokens(batch, num_layers)
    rounds = [batch.round(token) for (token,) in tokens.tolist()]
    for row in range(len(batch.rows)):
        cache.commit(row, 1)
    return rounds


def read_prompts(batch: Batch, num_layers: int) -> Tensor:
    """Run the rows' uncached tokens through the layers, in chunks, and commit them.

    Rows are padded on the right: what padding writes lies beyond a row's length, is never attended to, and is
    overwritten by the tokens that come.

    Returns:
        [B, 1, D], the hidden state of each row's last token.
    """
    decoder, cache = batch.decoder, batch.cache
    starts = list(cache.lengths)
    todo = [row.tokens[start:] for row, start in zip(batch.rows, starts, strict=True)]
    longest = max(map(len, todo))
    last: list[Tensor | None] = [None] * len(todo)
    for offset in range(0, longest, PREFILL_CHUNK):
        size = min(PREFILL_CHUNK, longest - offset)
        chunk = [(tokens[offset : offset + size] + [0] * size)[:size] for tokens in todo]
        positions = decoder.place(cache, [start + offset for start in starts], size)
        hidden = decoder.embed(torch.tensor(chunk, device=decoder.device))
        hidden = decoder.run_layers(hidden, positions, cache, 0, num_layers)
        for row, tokens in enumerate(todo):
            if offset < len(tokens) <= offset + size:
                last[row] = hidden[row, len(tokens) - 1 - offset]
    for row, tokens in enumerate(todo):
        cache.commit(row, len(tokens))
    return torch.stack([state for state in last if state is not None]).unsqueeze(1)


def _next_tokens(batch: Batch, num_layers: int) -> Tensor:
    """[B, 1], the token after each row's last one."""
    decoder, cache, pending = batch.decoder, batch.cache, batch.pending()
    positions = decoder.place(cache, cache.lengths, 1)
    if not batch.sampler.needs_context:
        tokens = decoder.choose(pending, positions, cache, 0, num_layers, batch.draw)
        if tokens is not None:
            return tokens
    hidden = decoder.run_layers(decoder.embed(pending), positions, cache, 0, num_layers)
    return _choose(batch, decoder.unembed(hidden))


def _choose(batch: Batch, logits: Tensor) -> Tensor:
    scores = batch.sampler.scores(logits, batch.contexts())
    return batch.sampler.choose(scores, batch.seeds, [len(row.tokens) for row in batch.rows])
