"""Where drafts come from: the first E layers, or the text itself.

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.noise import Purpose
from layerskip.model.attention import Positions
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder


@dataclass(kw_only=True)
class Draft:
    """What drafting leaves for verification."""

    exit_layer: int
    """E, layers that have been run; 0 where drafts come from the text."""
    num_drafts: list[int]
    """Drafts that each row can use; the tensors below are as long as the longest row needs."""
    tokens: Tensor
    """[B, K] token ids, on the device."""
    hidden: Tensor
    """[B, K + 1, D], outputs of layer E - 1 for the pending token and the drafts; their embeddings where E is 0."""
    exit_states: dict[int, Tensor] = field(default_factory=dict)
    """[B, K + 1, D] by exit: outputs of shallower exits, where they were asked for."""
    probs: list[Tensor] = field(default_factory=list)
    """K x [B, V] distributions that the drafts were drawn from, where acceptance needs them."""


def draft_lengths(batch: Batch, num_speculations: int) -> list[int]:
    """How many drafts each row can use: no more than it may still write, less the token that verification adds."""
    return [min(num_speculations, row.remaining - 1) for row in batch.rows]


def run_through(
    decoder: Decoder,
    hidden: Tensor,
    positions: Positions,
    cache: KVCache,
    start: int,
    stop: int,
    exits: Collection[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """`Decoder.run_layers`, also keeping the outputs of the exits on the way: those above `start`, up to `stop`."""
    states = {}
    for exit_layer in sorted(exit_ for exit_ in exits if start < exit_ <= stop):
        hidden = decoder.run_layers(hidden, positions, cache, start, exit_layer)
        states[exit_layer], start = hidden, exit_layer
    return decoder.run_layers(hidden, positions, cache, start, stop), states


def draft_nothing(batch: Batch) -> Draft:
    """No drafts: verification is then an autoregressive step."""
    token = batch.pending()
    return Draft(
        exit_layer=0,
        num_drafts=[0] * len(batch.rows),
        tokens=token.new_empty((len(batch.rows), 0)),
        hidden=batch.decoder.embed(token),
    )


@torch.inference_mode()
def draft_early_exit(batch: Batch, exit_layer: int, num_speculations: int, exits: Collection[int] = ()) -> Draft:
    """Write drafts with the first layers, nothing of which is committed.

    The last draft runs through the first layers too, without the head: verification needs its hidden state.

    Args:
        batch: The rows.
        exit_layer: E.
        num_speculations: Most drafts of a row.
        exits: Exits whose states are kept as well, where they are on the way.
    """
    decoder, cache, sampler = batch.decoder, batch.cache, batch.sampler
    num_drafts = draft_lengths(batch, num_speculations)
    if batch.greedy and not exits:
        found = decoder.draft_greedy(batch.pending(), cache, exit_layer, max(num_drafts))
        if found is not None:
            return Draft(exit_layer=exit_layer, num_drafts=num_drafts, tokens=found[0], hidden=found[1])
    keep_probs = batch.by_distribution
    counters = [row.recorder.rounds for row in batch.rows] if keep_probs else None
    purpose = Purpose.DRAFT if keep_probs else Purpose.TARGET
    token, tokens, hidden, probs = batch.pending(), [], [], []
    states: dict[int, list[Tensor]] = {}
    written: list[list[int]] = [[] for _ in batch.rows]
    for i in range(max(num_drafts) + 1):
        positions = decoder.place(cache, [length + i for length in cache.lengths], 1)
        out, passed = run_through(decoder, decoder.embed(token), positions, cache, 0, exit_layer, exits)
        hidden.append(out)
        for exit_, state in passed.items():
            states.setdefault(exit_, []).append(state)
        if i == max(num_drafts):
            break
        scores = sampler.scores(decoder.unembed(hidden[-1]), _last_contexts(batch, written))
        token = sampler.choose(scores, batch.seeds, [len(row.tokens) + i for row in batch.rows], purpose, counters)
        tokens.append(token)
        if keep_probs:
            probs.append(scores.softmax(-1).squeeze(1))
        if sampler.needs_context:
            for row, (new,) in zip(written, token.tolist(), strict=True):
                row.append(new)
    empty = token.new_empty((len(batch.rows), 0))
    return Draft(
        exit_layer=exit_layer,
        num_drafts=num_drafts,
        tokens=torch.cat(tokens, 1) if tokens else empty,
        hidden=torch.cat(hidden, 1),
        exit_states={exit_: torch.cat(parts, 1) for exit_, parts in states.items()},
        probs=probs,
    )


@torch.inference_mode()
def draft_ngram(batch: Batch, num_speculations: int) -> Draft:
    """Drafts of each row from its own text; rows without a match have none.

    Verification runs all layers over them: nothing has been run yet, so the hidden states are the embeddings.
    """
    lengths = draft_lengths(batch, num_speculations)
    found = [row.ngrams.continuation(length) for row, length in zip(batch.rows, lengths, strict=True)]
    longest = max(map(len, found))
    device = batch.decoder.device
    tokens = torch.tensor([drafts + [0] * (longest - len(drafts)) for drafts in found], device=device)
    tokens = tokens.view(len(found), longest).long()
    probs = []
    if batch.by_distribution:  # each draft is certain
        vocab_size = batch.decoder.config.vocab_size
        probs = [F.one_hot(column, vocab_size).float() for column in tokens.unbind(1)]
    return Draft(
        exit_layer=0,
        num_drafts=[len(drafts) for drafts in found],
        tokens=tokens,
        hidden=batch.decoder.embed(torch.cat((batch.pending(), tokens), 1)),
        probs=probs,
    )


def _last_contexts(batch: Batch, written: list[list[int]]) -> list[list[list[int]]] | None:
    """Tokens before the next draft of each row."""
    if not batch.sampler.needs_context:
        return None
    return [[row.tokens + drafts] for row, drafts in zip(batch.rows, written, strict=True)]
