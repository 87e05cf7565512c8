"""Drafting with the first E layers and verifying with the rest: same weights, same cache, same hidden states.

A round of K drafts costs (K + 1) x E + (L - E) layer calls: each token runs through layers 0..E-1 once, and the K + 1
hidden states kept at the exit run through layers E..L-1 together. Source: arXiv:2404.16710, section 3.3.

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch, Round
from layerskip.decoding.rounds.acceptance import accept_block, accept_matching, accept_rejection
from layerskip.decoding.rounds.drafting import Draft, draft_lengths, run_through
from layerskip.decoding.sampler import Sampler
from layerskip.model.finite import best_tokens
from layerskip.model.noise import Purpose, make_key, uniforms


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What verification gave each row, and what it showed of other exits."""

    rounds: list[Round]
    agreement: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By exit: tokens of all rows on which it agreed with the target (or the probability that its drafts would have
    been accepted, where distributions are compared), and how many tokens there were."""


@torch.inference_mode()
def verify(batch: Batch, draft: Draft, exits: Collection[int] = ()) -> Verification:
    """Run the kept hidden states through the other layers, accept drafts, and commit what holds.

    Args:
        batch: The rows.
        draft: Their drafts.
        exits: Exits of which to say how often they would have been right.
    """
    decoder, cache = batch.decoder, batch.cache
    start, stop = draft.exit_layer, decoder.num_layers
    inputs = torch.cat((batch.pending(), draft.tokens), 1) if draft.hidden is None else draft.hidden
    positions = decoder.place(cache, cache.lengths, inputs.shape[1])
    if batch.chooses_directly and not exits:
        targets = decoder.choose(inputs, positions, cache, start, stop, batch.draw)
        if targets is not None:
            return Verification(rounds=_commit(batch, draft, _compared(draft, targets)))
    hidden = decoder.embed(inputs) if draft.hidden is None else inputs
    hidden, states = run_through(decoder, hidden, positions, cache, start, stop, exits)
    judge = _Judge(batch, draft, decoder.unembed(hidden))
    rounds = _commit(batch, draft, judge.result())  # without exits, the round's only wait
    agreement = {
        exit_layer: judge.agreement(decoder.unembed(state), rounds)
        for exit_layer, state in {**draft.exit_states, **states}.items()
    }
    return Verification(rounds=rounds, agreement=agreement)


@torch.inference_mode()
def whole_round(batch: Batch, exit_layer: int, num_speculations: int) -> Verification | None:
    """Draft and verify in one call, where the network has compiled that.

    A row that can use fewer drafts than the others gets as many, and those beyond its end are ignored.

    Args:
        batch: The rows.
        exit_layer: E; 0 for a step without drafts.
        num_speculations: K, exactly.

    Returns:
        What holds, committed; or None where it takes drafting and verification.
    """
    num_drafts = draft_lengths(batch, num_speculations)
    most = max(num_drafts)
    if not batch.greedy or 2 * most < num_speculations:  # all rows end soon: most of the drafts would be in vain
        return None
    found = batch.decoder.round_greedy(batch.last_tokens, batch.cache, exit_layer, num_speculations)
    if found is None:
        return None
    draft = Draft(exit_layer=exit_layer, num_drafts=num_drafts, tokens=found.drafts, hidden=None)
    return Verification(rounds=_commit(batch, draft, _compared(draft, found.targets)))


class _Judge:
    """What the target says of the drafts, and of what other exits would have drafted."""

    def __init__(self, batch: Batch, draft: Draft, logits: Tensor) -> None:
        self._batch, self._draft = batch, draft
        self._contexts = batch.contexts(draft.tokens.tolist()) if batch.sampler.needs_context else None
        self._first = [len(row.tokens) for row in batch.rows]
        self._scores = batch.sampler.scores(logits, self._contexts)
        self._noise: Tensor | None = None
        self._targets = None if batch.by_distribution else self._choose(self._scores)

    def result(self) -> list[tuple[int, int]]:
        """Of each row, drafts that are accepted, and the token after those."""
        batch, draft = self._batch, self._draft
        if self._targets is not None:
            return _compared(draft, self._targets)
        drawn = draw_accepted(
            batch.sampler,
            draft.tokens,
            torch.stack(draft.probs, 1) if draft.probs else self._scores[:, :0],
            self._scores.softmax(-1),
            num_drafts=torch.tensor(draft.num_drafts, device=self._scores.device),
            seeds=batch.seeds,
            first=self._first,
            counters=[row.recorder.rounds for row in batch.rows],
            block=batch.config.block_verification,
        )
        return [(num_accepted, token) for num_accepted, token in drawn[:, -2:].tolist()]

    def agreement(self, logits: Tensor, rounds: Sequence[Round]) -> tuple[float, int]:
        """Tokens on which an exit agreed with the target, of how many: what follows a rejected draft doesn't count."""
        scores = self._batch.sampler.scores(logits, self._contexts)
        if self._targets is None:
            agrees = torch.minimum(scores.softmax(-1), self._scores.softmax(-1)).sum(-1)
        else:
            agrees = self._choose(scores) == self._targets
        counted = [found[: round_.num_accepted + 1] for found, round_ in zip(agrees.tolist(), rounds, strict=True)]
        return float(sum(map(sum, counted))), sum(map(len, counted))

    def _choose(self, scores: Tensor) -> Tensor:
        """The target's choice, or an exit's: both with the same noise, which is drawn once."""
        if not self._batch.sampler.samples:
            return best_tokens(scores)
        if self._noise is None:
            self._noise = self._batch.sampler.noise(scores, self._batch.seeds, self._first)
        return best_tokens(scores + self._noise)


def _compared(draft: Draft, targets: Tensor) -> list[tuple[int, int]]:
    """Of each row, drafts that the target chose too, and its token after those."""
    results = []
    found = torch.cat((draft.tokens, targets), 1).tolist()
    for row, usable in zip(found, draft.num_drafts, strict=True):
        drafts, chosen = row[:usable], row[draft.tokens.shape[1] :]
        num_accepted = accept_matching(drafts, chosen)
        results.append((num_accepted, chosen[num_accepted]))
    return results


def _commit(batch: Batch, draft: Draft, results: Sequence[tuple[int, int]]) -> list[Round]:
    """Commit the pending token and the accepted drafts of each row."""
    rounds = []
    for row, (tokens, (num_accepted, token)) in enumerate(zip(draft.tokens.tolist(), results, strict=True)):
        batch.cache.commit(row, num_accepted + 1)
        drafts = tuple(tokens[: draft.num_drafts[row]])
        rounds.append(batch.round(token, drafts, num_accepted))
    return rounds


def draw_accepted(
    sampler: Sampler,
    drafts: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    *,
    num_drafts: Tensor,
    seeds: Sequence[int],
    first: Sequence[int],
    counters: Sequence[int],
    block: bool,
) -> Tensor:
    """Rejection sampling of a round, its random numbers included.

    Args:
        sampler: Draws the token after the accepted drafts.
        drafts: [B, K] token ids, drawn from `draft_probs`.
        draft_probs: [B, K, V].
        target_probs: [B, K + 1, V].
        num_drafts: [B] drafts that each row can use.
        seeds: Seed of each row.
        first: Position in its text of each row's first draft.
        counters: Number of the round in each row: a position may come up in several rounds, each with fresh noise.
        block: Block verification, or one draft after the other.

    Returns:
        [B, K + 2]: the drafts, how many are accepted, and the token after those.
    """
    keys = [
        [make_key(seed, Purpose.ACCEPT, start + i, counter) for i in range(drafts.shape[1])]
        for seed, start, counter in zip(seeds, first, counters, strict=True)
    ]
    if drafts.shape[1] == 0:  # nothing to accept; the token is drawn just as in a batch where other rows have drafts
        accepted, probs = num_drafts, target_probs[:, 0]
    else:
        accept = accept_block if block else accept_rejection
        accepted, probs = accept(drafts, draft_probs, target_probs, uniforms(keys, drafts.device), num_drafts)
    token = sampler.choose(probs.log().unsqueeze(1), seeds, first, Purpose.RESIDUAL, counters)
    return torch.cat((drafts, accepted.unsqueeze(1), token), 1)
