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
from layerskip.decoding.drafting import Draft, run_through
from layerskip.decoding.noise import Purpose, make_key, uniforms
from layerskip.decoding.sampling import Sampler
from layerskip.decoding.verification import accept_block, accept_matching, accept_rejection


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
    decoder, cache, sampler = batch.decoder, batch.cache, batch.sampler
    num_queries = draft.hidden.shape[1]
    positions = decoder.place(cache, cache.lengths, num_queries)
    hidden, states = run_through(decoder, draft.hidden, positions, cache, draft.exit_layer, decoder.num_layers, exits)
    contexts = batch.contexts(draft.tokens.tolist()) if sampler.needs_context else None
    scores = sampler.scores(decoder.unembed(hidden), contexts)
    first = [len(row.tokens) for row in batch.rows]
    usable = torch.tensor(draft.num_drafts, device=scores.device)
    if batch.by_distribution:
        result = draw_accepted(
            sampler,
            draft.tokens,
            torch.stack(draft.probs, 1) if draft.probs else scores[:, :0],
            scores.softmax(-1),
            num_drafts=usable,
            seeds=batch.seeds,
            first=first,
            counters=[row.recorder.rounds for row in batch.rows],
            block=batch.config.block_verification,
        )
    else:
        targets = sampler.choose(scores, batch.seeds, first)
        accepted = accept_matching(draft.tokens, targets, usable).unsqueeze(1)
        result = torch.cat((draft.tokens, accepted, targets.gather(1, accepted)), 1)
    agreement = {}
    for exit_layer, state in {**draft.exit_states, **states}.items():
        exit_scores = sampler.scores(decoder.unembed(state), contexts)
        if batch.by_distribution:
            agrees = torch.minimum(exit_scores.softmax(-1), scores.softmax(-1)).sum(-1)
        else:
            agrees = (sampler.choose(exit_scores, batch.seeds, first) == targets).float()
        valid = (
            torch.arange(num_queries, device=agrees.device) <= result[:, -2:-1]
        )  # what follows a rejected draft isn't
        agreement[exit_layer] = (float((agrees * valid).sum()), int(valid.sum()))
    rounds = []
    for row, (*tokens, num_accepted, token) in enumerate(result.tolist()):  # without exits, the round's only wait
        cache.commit(row, num_accepted + 1)
        drafts = tuple(tokens[: draft.num_drafts[row]])
        rounds.append(Round(drafts=drafts, num_accepted=num_accepted, token=token))
    return Verification(rounds=rounds, agreement=agreement)


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
