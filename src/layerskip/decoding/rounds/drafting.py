"""Drafts for rows that need logits, and drafts from the sequence itself.

Rows that need tokens only are drafted by the network (`Decoder.draft`).

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.ngrams.index import Match
from layerskip.model.drafts import Drafts, StopRule
from layerskip.model.noise import Purpose


def draft_from_layers(
    batch: Batch, exit_layer: int, num_drafts: int, exits: Collection[int] = (), stop: StopRule | None = None
) -> Drafts:
    """Draft with the first layers, through the logits of every draft; nothing is committed.

    Args:
        batch: The rows.
        exit_layer: E.
        num_drafts: K, at most.
        exits: Exits whose states are kept as well, where they are on the way.
        stop: When to draft fewer.
    """
    drafter = batch.decoder.drafter(exit_layer)
    decoder, shares = drafter.decoder, drafter.shares_states
    states = _States(batch, exit_layer, exits if shares else ())
    choices = _Choices(batch)
    token = batch.pending()
    tokens = [token[:, :0]]
    hidden: list[Tensor] = []
    while len(tokens) <= num_drafts and not (stop is not None and len(tokens) > 1 and stop.ends(choices.confidences)):
        hidden.append(states.run(token, len(hidden)))
        token = choices.next(decoder.own_logits(states.read()), confident=stop is not None)
        tokens.append(token)
    if shares:
        hidden.append(states.run(token, len(hidden)))
        states.write_keys()
    return Drafts(
        tokens=torch.cat(tokens, 1),
        exit_layer=exit_layer if shares else 0,
        hidden=torch.cat(hidden, 1) if shares else None,
        confidences=choices.confidences if stop is not None else (),
        exit_states={exit_: torch.cat(parts, 1) for exit_, parts in states.kept.items()},
        probs=choices.probs,
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
        self.confidences: list[list[float]] = [[] for _ in batch.rows]

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
            for row, confidence in zip(self.confidences, chosen.tolist(), strict=True):
                row.append(confidence)
        if sampler.needs_context:
            for drafts, (new,) in zip(self._drafts, token.tolist(), strict=True):
                drafts.append(new)
        return token


def draft_from_text(batch: Batch, matches: Sequence[Match | None], num_speculations: int) -> tuple[Drafts, list[int]]:
    """Drafts of each row from its own tokens, and how many each row has; rows without a match have none.

    Verification runs all layers over them: nothing has run yet.
    """
    lengths = batch.draft_lengths(num_speculations)
    continued = [
        match.continuation(length) if match is not None else [] for match, length in zip(matches, lengths, strict=True)
    ]
    longest = max(map(len, continued))
    padded = [drafts + [0] * (longest - len(drafts)) for drafts in continued]
    tokens = torch.tensor(padded, device=batch.decoder.device).view(len(continued), longest).long()
    probs: list[Tensor] = []
    if batch.by_distribution:  # each draft is certain
        part = torch.arange(len(vocabulary := batch.decoder.vocabulary.tokens), device=tokens.device)
        probs = [(column.unsqueeze(-1) - vocabulary.start == part).float() for column in tokens.unbind(1)]
    return Drafts(tokens=tokens, probs=probs), [len(drafts) for drafts in continued]
