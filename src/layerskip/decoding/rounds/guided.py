"""Drafts of rows of which some have a constraint: what it forbids is never drafted, what it forces costs nothing.

Rows may have different numbers of drafts. A row's forced tokens join the next block of the first layers, so that they
need no pass of their own; with drafts from elsewhere, no layer has to run for them at all before verification.

Shapes: B rows, K drafts a row at most, Q tokens of a block, D width, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.row import Row
from layerskip.decoding.rules.guide import Step
from layerskip.model.choosing.noise import Purpose
from layerskip.model.drafts import Drafts, StopRule
from layerskip.model.finite import NO_TOKEN

MOST_FORCED = 32
"""Forced tokens of a round: each widens the block that is verified."""


@dataclass(kw_only=True)
class RowDrafts:
    """Drafts of one row as they come."""

    row: Row
    limit: int
    """Drafts that may be chosen."""
    tokens: list[int] = field(default_factory=list)
    certain: list[bool] = field(default_factory=list)
    """For each token, whether it was forced."""
    ended: bool = False
    """Whether nothing can be drafted after these."""

    def step(self) -> Step | None:
        """What the row's constraint says of the next token; None if anything may follow."""
        return self.row.guide.at(self.tokens) if self.row.guide is not None else None

    @property
    def chooses(self) -> bool:
        """Whether the next draft is to be chosen."""
        chosen = len(self.tokens) - sum(self.certain)
        return not self.ended and chosen < self.limit and len(self.tokens) < self.row.remaining - 1

    def add(self, token: int, *, certain: bool = False) -> None:
        """Add a draft, unless it can't be one."""
        step = self.step()
        if token == NO_TOKEN or (step is not None and not step.allows(token)):
            self.ended = True
            return
        self.tokens.append(token)
        self.certain.append(certain)
        step = self.step()
        self.ended = step is not None and step.ended

    def add_forced(self) -> None:
        """Add the tokens that the constraint forces."""
        room = min(self.row.remaining - 1 - len(self.tokens), MOST_FORCED - sum(self.certain))
        while room > 0 and not self.ended and (step := self.step()) is not None and step.forced is not None:
            self.add(step.forced, certain=True)
            room -= 1


@dataclass(frozen=True, kw_only=True)
class GuidedDrafts:
    """Drafts of rows, each with as many as it can use."""

    drafts: Drafts
    """Padded on the right."""
    certain: list[list[bool]]
    """For each row and draft, whether it was forced."""


def draft_forced(batch: Batch) -> GuidedDrafts:
    """What constraints force, and nothing else."""
    rows = [RowDrafts(row=row, limit=0) for row in batch.rows]
    for row in rows:
        row.add_forced()
    return _without_layers(batch, rows)


def draft_guided_text(batch: Batch, matches: Sequence[Match | None], lengths: Sequence[int]) -> GuidedDrafts:
    """Drafts from the rows' own tokens, up to one that a constraint forbids, and what it forces on the way."""
    rows = [RowDrafts(row=row, limit=length) for row, length in zip(batch.rows, lengths, strict=True)]
    for row, match in zip(rows, matches, strict=True):
        _follow(row, match.continuation(row.limit) if match is not None else [])
    return _without_layers(batch, rows)


def _follow(row: RowDrafts, tokens: list[int]) -> None:
    """Draft tokens that followed before, as long as what is forced between them agrees."""
    while True:
        length = len(row.tokens)
        row.add_forced()
        forced = row.tokens[length:]
        if tokens[: len(forced)] != forced:
            return
        tokens = tokens[len(forced) :]
        if not tokens or not row.chooses:
            return
        row.add(tokens[0])
        tokens = tokens[1:]


def _without_layers(batch: Batch, rows: Sequence[RowDrafts]) -> GuidedDrafts:
    """Verification runs all layers over them."""
    tokens = _padded(rows, batch.decoder.device)
    probs: list[Tensor] = []
    if batch.by_distribution:  # each draft is certain
        part = torch.arange(len(vocabulary := batch.decoder.vocabulary.tokens), device=tokens.device)
        probs = [(column.unsqueeze(-1) - vocabulary.start == part).float() for column in tokens.unbind(1)]
    return _guided(rows, Drafts(tokens=tokens, lengths=_lengths(rows), probs=probs))


def draft_guided(
    batch: Batch,
    exit_layer: int,
    lengths: Sequence[int],
    exits: Collection[int] = (),
    stop: StopRule | None = None,
) -> GuidedDrafts:
    """Draft with the first layers; nothing is committed.

    Args:
        batch: The rows.
        exit_layer: E.
        lengths: Drafts of each row that the layers choose, at most; what is forced comes on top.
        exits: Exits whose states are kept as well, where they are on the way.
        stop: When a row drafts fewer; no draft that was chosen is given up.
    """
    drafter = batch.decoder.drafter(exit_layer)
    shares = drafter.shares_states
    rows = [RowDrafts(row=row, limit=length) for row, length in zip(batch.rows, lengths, strict=True)]
    for row in rows:
        row.add_forced()
    blocks = _Blocks(batch, exit_layer, exits if shares else ())
    choices = _RaggedChoices(batch, rows, stop)
    while any(row.chooses for row in rows):
        choices.next(drafter.decoder.own_logits(blocks.read(rows)))
    if shares:
        blocks.finish(rows)
    return _guided(
        rows,
        Drafts(
            tokens=_padded(rows, batch.decoder.device),
            lengths=_lengths(rows),
            exit_layer=exit_layer if shares else 0,
            hidden=_stack(blocks.hidden) if shares else None,
            confidences=choices.confidences if stop is not None else (),
            exit_states={exit_: _stack(states) for exit_, states in blocks.kept.items()},
            probs=choices.probs() if batch.by_distribution else [],
        ),
    )


class _Blocks:
    """Runs the first layers over the tokens of each row that haven't run yet, and keeps their states by row."""

    def __init__(self, batch: Batch, exit_layer: int, exits: Collection[int]) -> None:
        self._decoder, self._cache = batch.decoder.drafter(exit_layer).decoder, batch.cache
        self._exit_layer, self._exits = exit_layer, [exit_ for exit_ in exits if exit_ != exit_layer]
        self._keeps_own = exit_layer in exits
        self._num_run = [0] * batch.num_rows
        """Tokens of each row that have run: its pending one, then drafts."""
        self.hidden: list[list[Tensor]] = [[] for _ in batch.rows]
        """By row, states [n, D] at the exit."""
        self.kept: dict[int, list[list[Tensor]]] = {}
        """The same of other exits, as adapters give them."""

    def read(self, rows: Sequence[RowDrafts]) -> Tensor:
        """What the head reads for each row's last token: [B, 1, D]."""
        sizes = self._run(rows)
        state = self._read(sizes)
        last = torch.tensor([max(0, size - 1) for size in sizes], device=state.device)
        return state[torch.arange(len(rows), device=state.device), last].unsqueeze(1)

    def finish(self, rows: Sequence[RowDrafts]) -> None:
        """Run the layers over what is left, of which nothing is drafted."""
        sizes = self._run(rows)
        if not any(sizes):
            return
        if self._keeps_own:
            self._read(sizes)
        else:
            self._decoder.write_adapter_keys(self._block, self._positions, self._cache)

    def _run(self, rows: Sequence[RowDrafts]) -> list[int]:
        """Run what hasn't run yet, padded on the right; returns the number of tokens of each row."""
        decoder, cache = self._decoder, self._cache
        new = [[row.row.tokens[-1], *row.tokens][done:] for row, done in zip(rows, self._num_run, strict=True)]
        sizes = list(map(len, new))
        width = max(sizes)
        if width == 0:
            return sizes
        first = [length + done for length, done in zip(cache.lengths, self._num_run, strict=True)]
        tokens = torch.tensor([part + [0] * (width - len(part)) for part in new], device=decoder.device)
        self._positions = decoder.place(cache, first, width)
        embedded = decoder.embed(tokens)
        self._block, passed = decoder.run_exits(embedded, self._positions, cache, 0, self._exit_layer, self._exits)
        _keep(self.hidden, self._block, sizes)
        for exit_layer, state in passed.items():
            _keep(self.kept.setdefault(exit_layer, [[] for _ in rows]), state, sizes)
        self._num_run = [done + size for done, size in zip(self._num_run, sizes, strict=True)]
        return sizes

    def _read(self, sizes: Sequence[int]) -> Tensor:
        """[B, Q, D], what the head reads for the block that has run last."""
        state = self._decoder.read(self._block, self._positions, self._cache)
        if self._keeps_own:
            _keep(self.kept.setdefault(self._exit_layer, [[] for _ in sizes]), state, sizes)
        return state


class _RaggedChoices:
    """Chooses the next draft of the rows that take one, by their rules."""

    def __init__(self, batch: Batch, rows: Sequence[RowDrafts], stop: StopRule | None) -> None:
        self._batch, self._rows, self._stop = batch, rows, stop
        by_distribution = batch.by_distribution
        self._purpose = Purpose.DRAFT if by_distribution else Purpose.TARGET
        self._counters = [row.recorder.rounds for row in batch.rows] if by_distribution else None
        self.confidences: list[list[float]] = [[] for _ in rows]
        """By row, of the drafts that were chosen."""
        self._probs: list[list[Tensor]] = [[] for _ in rows]

    def next(self, logits: Tensor) -> None:
        """Give rows a draft, and what is forced after it, by logits [B, 1, V]."""
        batch, sampler, vocabulary = self._batch, self._batch.sampler, self._batch.decoder.vocabulary
        confident = self._stop is not None
        steps = [row.step() if row.chooses else None for row in self._rows]
        contexts = [[row.row.tokens + row.tokens] for row in self._rows] if sampler.needs_context else None
        scores = sampler.scores(logits, contexts, [[step] for step in steps])
        first = [len(row.row.tokens) + len(row.tokens) for row in self._rows]
        tokens = sampler.choose(scores, first, self._purpose, self._counters)
        probs = vocabulary.softmax(scores) if confident or batch.by_distribution else scores
        chosen = vocabulary.at(probs, tokens).flatten().tolist() if confident else [0.0] * len(first)
        for place, (row, (token,)) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
            if not row.chooses:
                continue
            length = len(row.tokens)
            row.add(token)
            if len(row.tokens) > length:
                self.confidences[place].append(chosen[place])
                self._probs[place].append(probs[place, 0])
            row.add_forced()
            if self._stop is not None and self._stop.chance(self.confidences[place]) < self._stop.least:
                row.ended = True

    def probs(self) -> list[Tensor]:
        """K x [B, V], the distributions that drafts were drawn from; a forced one is certain."""
        tokens = self._batch.decoder.vocabulary.tokens
        longest = max(len(row.tokens) for row in self._rows)
        probs = torch.zeros((len(self._rows), longest, len(tokens)), device=self._batch.decoder.device)
        for place, row in enumerate(self._rows):
            drawn = iter(self._probs[place])
            for i, (token, certain) in enumerate(zip(row.tokens, row.certain, strict=True)):
                if not certain:
                    probs[place, i] = next(drawn)
                elif token in tokens:
                    probs[place, i, token - tokens.start] = 1.0
        return list(probs.unbind(1))


def _keep(by_row: list[list[Tensor]], block: Tensor, sizes: Sequence[int]) -> None:
    """Keep the first states of each row of a block [B, Q, D]."""
    for states, block_row, size in zip(by_row, block, sizes, strict=True):
        states.append(block_row[:size])


def _stack(by_row: Sequence[Sequence[Tensor]]) -> Tensor:
    """States of rows, [B, Q, D], padded with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.cat(list(states)) for states in by_row], batch_first=True)


def _padded(rows: Sequence[RowDrafts], device: torch.device) -> Tensor:
    """[B, K], drafts padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    padded = [row.tokens + [0] * (longest - len(row.tokens)) for row in rows]
    return torch.tensor(padded, device=device).view(len(rows), longest).long()


def _guided(rows: Sequence[RowDrafts], drafts: Drafts) -> GuidedDrafts:
    return GuidedDrafts(drafts=drafts, certain=[row.certain for row in rows])


def _lengths(rows: Sequence[RowDrafts]) -> list[int]:
    return [len(row.tokens) for row in rows]
