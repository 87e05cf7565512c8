"""Where drafts come from: the first E layers, or the text itself.

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.ngram import Match
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, DraftStop, confidence_class
from layerskip.model.noise import Purpose
from layerskip.model.positions import Positions


@dataclass(kw_only=True)
class Draft:
    """What drafting leaves for verification."""

    exit_layer: int
    """E, layers that have been run; 0 where drafts come from the text."""
    num_drafts: list[int]
    """Drafts that each row can use; the tensors below are as long as the longest row needs."""
    tokens: Tensor
    """[B, K] token ids, on the device."""
    hidden: Tensor | None
    """[B, K + 1, D], outputs of layer E - 1 for the pending token and the drafts; None where E is 0."""
    exit_states: dict[int, Tensor] = field(default_factory=dict)
    """[B, K + 1, D] by exit: outputs of shallower exits, where they were asked for."""
    confidences: list[list[float]] = field(default_factory=list)
    """Probability of each row's drafts, where drafting could stop early."""
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
        hidden=None,
    )


@torch.inference_mode()
def draft_early_exit(
    batch: Batch, exit_layer: int, num_speculations: int, exits: Collection[int] = (), stop: DraftStop | None = None
) -> Draft:
    """Write drafts with the first layers, nothing of which is committed.

    The last draft runs through the first layers too, without the head: verification needs its hidden state. Not where
    drafts are written with other weights: what these leave in the cache is overwritten by verification, which then
    begins with the first layer.

    Args:
        batch: The rows.
        exit_layer: E.
        num_speculations: Most drafts of a row.
        exits: Exits whose states are kept as well, where they are on the way.
        stop: When to stop before the full length.
    """
    num_drafts = draft_lengths(batch, num_speculations)
    drafter = batch.decoder.drafter(exit_layer)
    if batch.chooses_directly and not (exits and drafter.shares_states):
        request = DraftRequest(
            exit_layer=exit_layer,
            num_drafts=max(num_drafts),
            stop=stop,
            draw=batch.draw,
            complete=drafter.shares_states,
        )
        found = drafter.decoder.draft(batch.pending(), batch.cache, request)
        if found is not None:
            made = found.tokens.shape[1]
            return Draft(
                exit_layer=exit_layer if drafter.shares_states else 0,
                num_drafts=[min(usable, made) for usable in num_drafts],
                tokens=found.tokens,
                hidden=found.hidden if drafter.shares_states else None,
                confidences=found.confidences,
            )
    return _EarlyExitDrafter(batch, exit_layer, exits, stop).run(num_drafts)


class _EarlyExitDrafter:
    """Drafts pass by pass, with whatever sampling asks for."""

    def __init__(self, batch: Batch, exit_layer: int, exits: Collection[int], stop: DraftStop | None) -> None:
        self._batch, self._exit_layer, self._stop = batch, exit_layer, stop
        self._drafter = batch.decoder.drafter(exit_layer)
        self._exits = exits if self._drafter.shares_states else ()
        self._purpose = Purpose.DRAFT if batch.by_distribution else Purpose.TARGET
        self._counters = [row.recorder.rounds for row in batch.rows] if batch.by_distribution else None
        self._states: dict[int, list[Tensor]] = {}
        self._probs: list[Tensor] = []
        self._written: list[list[int]] = [[] for _ in batch.rows]
        self._confidences: list[list[float]] = [[] for _ in batch.rows]

    def run(self, num_drafts: list[int]) -> Draft:
        batch = self._batch
        token = batch.pending()
        empty = token.new_empty((len(batch.rows), 0))
        hidden: list[Tensor] = []
        tokens = [empty]
        shares = self._drafter.shares_states
        while len(tokens) <= max(num_drafts) and not self._stops():
            hidden.append(self._pass(token, len(hidden)))
            token = self._choose(hidden[-1], len(tokens) - 1)
            tokens.append(token)
        if shares:
            hidden.append(self._pass(token, len(hidden)))
        return Draft(
            exit_layer=self._exit_layer if shares else 0,
            num_drafts=[min(usable, len(tokens) - 1) for usable in num_drafts],
            tokens=torch.cat(tokens, 1),
            hidden=torch.cat(hidden, 1) if shares else None,
            exit_states={exit_: torch.cat(parts, 1) for exit_, parts in self._states.items()},
            confidences=self._confidences if self._stop is not None else [],
            probs=self._probs,
        )

    def _pass(self, token: Tensor, offset: int) -> Tensor:
        decoder, cache = self._drafter.decoder, self._batch.cache
        positions = decoder.place(cache, [length + offset for length in cache.lengths], 1)
        out, passed = run_through(decoder, decoder.embed(token), positions, cache, 0, self._exit_layer, self._exits)
        for exit_, state in passed.items():
            self._states.setdefault(exit_, []).append(state)
        return out

    def _choose(self, hidden: Tensor, offset: int) -> Tensor:
        batch, sampler = self._batch, self._batch.sampler
        contexts = None
        if sampler.needs_context:
            contexts = [[row.tokens + drafts] for row, drafts in zip(batch.rows, self._written, strict=True)]
        scores = sampler.scores(self._drafter.decoder.unembed(hidden), contexts)
        first = [len(row.tokens) + offset for row in batch.rows]
        token = sampler.choose(scores, batch.seeds, first, self._purpose, self._counters)
        if batch.by_distribution:
            self._probs.append(scores.softmax(-1).squeeze(1))
        if self._stop is not None:
            chosen = scores.softmax(-1).gather(-1, token.clamp(min=0).unsqueeze(-1)).flatten()
            for row, confidence in zip(self._confidences, chosen.tolist(), strict=True):
                row.append(confidence)
        if sampler.needs_context:
            for written, (new,) in zip(self._written, token.tolist(), strict=True):
                written.append(new)
        return token

    def _stops(self) -> bool:
        """Whether the chance that all drafts of a row hold has become too small."""
        if self._stop is None or not self._confidences[0]:
            return False
        rates = self._stop.rates
        chances = [math.prod(rates[confidence_class(x)] for x in row) for row in self._confidences]
        return sum(chances) < self._stop.least * len(chances)


@torch.inference_mode()
def draft_ngram(batch: Batch, matches: Sequence[Match | None], num_speculations: int) -> Draft:
    """Drafts of each row from its own text; rows without a match have none.

    Verification runs all layers over them: nothing has been run yet.
    """
    lengths = draft_lengths(batch, num_speculations)
    found = [
        match.continuation(length) if match is not None else [] for match, length in zip(matches, lengths, strict=True)
    ]
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
        hidden=None,
        probs=probs,
    )
