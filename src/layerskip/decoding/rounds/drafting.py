"""Drafts for rows that need logits, and drafts from the sequence itself.

Rows that need tokens only are drafted by the network (`Decoder.draft`).

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.policy import Plan
from layerskip.model.choosing.noise import Purpose
from layerskip.model.drafts import DraftCounts, Drafts, StopRule


def draft_from_layers(
    batch: Batch,
    exit_layer: int,
    lengths: Sequence[int],
    exits: Collection[int] = (),
    stop: StopRule | None = None,
) -> Drafts:
    """Draft with the first layers, through the logits of every draft; nothing is committed.

    Args:
        batch: The rows.
        exit_layer: E.
        lengths: Drafts of each row at most; the longest is K.
        exits: Exits whose states are kept as well, where they are on the way.
        stop: When to draft fewer. With rejection sampling no draft is given up by what it is.
    """
    drafter = batch.decoder.drafter(exit_layer)
    decoder, shares = drafter.decoder, drafter.shares_states
    states = _States(batch, exit_layer, exits if shares else ())
    choices = _Choices(batch)
    token = batch.pending()
    tokens = [token[:, :0]]
    hidden: list[Tensor] = []
    if stop is not None and batch.by_distribution:
        stop = replace(stop, kept=0.0)
    counts = DraftCounts(lengths, stop)
    while counts.goes_on:
        hidden.append(states.run(token, len(hidden)))
        token = choices.next(decoder.own_logits(states.read()), confident=stop is not None)
        tokens.append(token)
        counts.add(choices.confidences)
    longest = max(counts.counts)
    if shares and longest == len(hidden):
        hidden.append(states.run(token, len(hidden)))
        states.write_keys()
    return Drafts(
        tokens=torch.cat(tokens[: longest + 1], 1),
        lengths=counts.counts,
        exit_layer=exit_layer if shares else 0,
        hidden=torch.cat(hidden, 1) if shares else None,
        confidences=counts.confidences if stop is not None else (),
        exit_states={exit_: torch.cat(parts, 1) for exit_, parts in states.kept.items()},
        probs=choices.probs[:longest],
    )


class _States:
    """Runs the first layers over one token of each row after the other, and keeps the states of exits on the way."""

    def __init__(self, batch: Batch, exit_layer: int, exits: Collection[int]) -> None:
        self._decoder, self._cache = batch.decoder.drafter(exit_layer).decoder, batch.cache
        # The state at the exit itself is what its drafts are made of, which `read` gives.
        self._exit_layer, self._exits = exit_layer, [exit_ for exit_ in exits if exit_ != exit_layer]
        self._keeps_own = exit_layer in exits
        self.kept: dict[int, list[Tensor]] = {}

    def run(self, token: Tensor, offset: int) -> Tensor:
        """The state at the exit, [B, 1, D], for the `offset`-th token after what is committed."""
        decoder, cache = self._decoder, self._cache
        self._positions = decoder.place(cache, [length + offset for length in cache.lengths], 1)
        embedded = decoder.embed(token)
        self._hidden, passed = decoder.run_exits(embedded, self._positions, cache, 0, self._exit_layer, self._exits)
        for exit_layer, state in passed.items():
            self.kept.setdefault(exit_layer, []).append(state)
        return self._hidden

    def read(self) -> Tensor:
        """What the head reads for that token."""
        state = self._decoder.read(self._hidden, self._positions, self._cache)
        if self._keeps_own:
            self.kept.setdefault(self._exit_layer, []).append(state)
        return state

    def write_keys(self) -> None:
        """Write the adapter's keys for that token, of which nothing is drafted."""
        if self._keeps_own:
            self.read()
        else:
            self._decoder.write_adapter_keys(self._hidden, self._positions, self._cache)


class _Choices:
    """Chooses draft after draft by the rows' rules, and keeps what acceptance and stop rules ask for."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        by_distribution = batch.by_distribution
        self._purpose = Purpose.DRAFT if by_distribution else Purpose.TARGET
        self._counters = [row.recorder.rounds for row in batch.rows] if by_distribution else None
        self._drafts: list[list[int]] = [[] for _ in batch.rows]
        self._offset = 0
        self.probs: list[Tensor] = []
        self.confidences: list[float] = []
        """Probability of each row's latest draft, where it was asked for."""

    def next(self, logits: Tensor, *, confident: bool) -> Tensor:
        """[B, 1, V] -> [B, 1]; `confident`: note the probability of each draft."""
        batch, sampler = self._batch, self._batch.sampler
        contexts = None
        if sampler.needs_context:
            contexts = [[row.tokens + drafts] for row, drafts in zip(batch.rows, self._drafts, strict=True)]
        scores = sampler.scores(logits, contexts)
        first = [len(row.tokens) + self._offset for row in batch.rows]
        token = sampler.choose(scores, first, self._purpose, self._counters)
        self._offset += 1
        vocabulary = batch.decoder.vocabulary
        if batch.by_distribution:
            self.probs.append(vocabulary.softmax(scores).squeeze(1))
        if confident:
            chosen = vocabulary.at(vocabulary.softmax(scores), token).flatten()
            self.confidences = chosen.tolist()
        if sampler.needs_context:
            for drafts, (new,) in zip(self._drafts, token.tolist(), strict=True):
                drafts.append(new)
        return token


def continuations(batch: Batch, matches: Sequence[Match | None], plan: Plan) -> list[list[int]]:
    """What followed each row's last tokens where they occurred before; nothing for rows without a match."""
    lengths = batch.draft_lengths(plan)
    return [
        match.continuation(length) if match is not None else [] for match, length in zip(matches, lengths, strict=True)
    ]


def draft_from_text(batch: Batch, matches: Sequence[Match | None], plan: Plan) -> Drafts:
    """Drafts of each row from its own tokens. Verification runs all layers over them: nothing has run yet."""
    drafts = batch.decoder.padded(continuations(batch, matches, plan))
    if batch.by_distribution:  # each draft is certain
        part = torch.arange(len(vocabulary := batch.decoder.vocabulary.tokens), device=drafts.tokens.device)
        drafts.probs = [(column.unsqueeze(-1) - vocabulary.start == part).float() for column in drafts.tokens.unbind(1)]
    return drafts
