"""A round: draft, verify with all layers, accept, and commit what was accepted to the cache.

Drafts come from the first E layers (same weights, same cache, same hidden states) or from the sequence itself. A round
of K drafts of exit E costs (K + 1) x E + (L - E) layer calls: each token runs through layers 0..E-1 once, and the K + 1
hidden states at the exit run through layers E..L-1 together. Source: arXiv:2404.16710, section 3.3.

Shapes: B rows, K drafts a row, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from layerskip.decoding.batch import Batch
from layerskip.decoding.policy import Plan, RoundResult
from layerskip.decoding.rounds.acceptance import accept_block, accept_matching, accept_rejection
from layerskip.decoding.rounds.drafting import continuations, draft_from_layers, draft_from_text
from layerskip.decoding.rounds.guided import GuidedDrafts, draft_forced, draft_guided, draft_guided_text
from layerskip.decoding.rounds.plain import step
from layerskip.decoding.rounds.telling import tell_tokens
from layerskip.decoding.sampler import Sampler
from layerskip.model.choosing.noise import Purpose, make_key, uniforms
from layerskip.model.choosing.sampling import add_noise, noise_for
from layerskip.model.drafts import DraftRequest, Drafts, Lease, RoundTokens

FOREIGN_ROUNDS = 8
"""Rounds in one call where texts of other requests may draft as well, which compiled code doesn't see."""


@torch.inference_mode()
def run_rounds(batch: Batch, plan: Plan, *, most: int = 1, seconds: float = 0.0) -> list[RoundResult]:
    """Do what a plan says, and commit each row's pending token and accepted drafts to the cache.

    Args:
        batch: The rows.
        plan: What each round does.
        most: Rounds at most; several are run only where one call can run them.
        seconds: No further round begins after that.

    Returns:
        What each round gave, at least one; rows end in none but the last.
    """
    if batch.needs == "tokens" and not plan.probe:
        results = _through_tokens(batch, plan, most, seconds)
    else:
        results = [step(batch) if plan.steps else _through_logits(batch, plan)]
    for row, gained in enumerate(zip(*(result.num_accepted for result in results), strict=True)):
        batch.cache.commit(row, sum(gained) + len(gained))
    return results


def _through_tokens(batch: Batch, plan: Plan, most: int, seconds: float) -> list[RoundResult]:
    """Rounds of rows that need tokens only."""
    decoder, last, cache, depth = batch.decoder, batch.last_tokens, batch.cache, batch.depth
    if plan.source == "text":
        drafts = continuations(batch, batch.matches(), plan)
        request = DraftRequest(exit_layer=0, num_drafts=0, draw=batch.sampler.draw)
        return [_accepted(decoder.round(last, cache, request, depth, drafts), list(map(len, drafts)))]
    drafts_layers = plan.source == "layers"
    num_drafts = batch.draft_lengths(plan) if drafts_layers else [0] * batch.num_rows
    request = DraftRequest(
        exit_layer=plan.exit_layer if drafts_layers else 0,
        num_drafts=max(num_drafts),
        lengths=tuple(num_drafts),
        planned=plan.num_speculations if drafts_layers else 0,
        stop=plan.stop,
        draw=batch.sampler.draw,
    )
    remaining = [row.remaining for row in batch.rows]
    watched = [row.tokens for row in batch.rows] if plan.until_repeated else ()
    if watched and not plan.steps and any(row.suffixes is not None for row in batch.rows):
        most = min(most, FOREIGN_ROUNDS)
    lease = Lease(
        rounds=most,
        seconds=seconds,
        remaining=remaining,
        ends=batch.ends,
        texts=watched,
        repeated=plan.until_repeated,
    )
    rounds = decoder.rounds(last, cache, request, depth, lease)
    return [_accepted(tokens, num_drafts) if request.num_drafts else _stepped(tokens) for tokens in rounds]


def _stepped(tokens: RoundTokens) -> RoundResult:
    """What a round without drafts gave."""
    rows = len(tokens.targets)
    return RoundResult(
        drafts=[()] * rows,
        num_accepted=[0] * rows,
        tokens=[targets[0] for targets in tokens.targets],
        seconds_verifying=tokens.seconds_verifying,
    )


def _accepted(tokens: RoundTokens, num_drafts: Sequence[int]) -> RoundResult:
    """What a round gave, of whose drafts each row can use so many."""
    result = _matching(tokens.drafts, num_drafts, tokens.targets)
    result.confidences = tokens.confidences
    result.seconds_drafting, result.seconds_verifying = tokens.seconds_drafting, tokens.seconds_verifying
    return result


def _matching(
    drafts: Sequence[Sequence[int]], num_drafts: Sequence[int], targets: Sequence[Sequence[int]]
) -> RoundResult:
    """Accept the drafts that the target chose too; the token after them is the target's."""
    usable = [tuple(row[:number]) for row, number in zip(drafts, num_drafts, strict=True)]
    num_accepted = [accept_matching(row, chosen) for row, chosen in zip(usable, targets, strict=True)]
    tokens = [chosen[number] for chosen, number in zip(targets, num_accepted, strict=True)]
    return RoundResult(drafts=usable, num_accepted=num_accepted, tokens=tokens)


def _through_logits(batch: Batch, plan: Plan) -> RoundResult:
    """A round of rows whose drafts or targets depend on more than tokens, or one that probes exits."""
    decoder, cache, watch = batch.decoder, batch.cache, batch.decoder.stopwatch
    start = watch.mark()
    drafts, certain = _draft(batch, plan)
    middle = watch.mark()
    inputs = torch.cat((batch.pending(), drafts.tokens), 1) if drafts.hidden is None else drafts.hidden
    positions = decoder.place(cache, cache.lengths, inputs.shape[1])
    hidden = decoder.embed(inputs) if drafts.hidden is None else inputs
    first, last = drafts.exit_layer, decoder.num_layers
    hidden, states = decoder.run_exits(hidden, positions, cache, first, last, plan.probe)
    logits = decoder.own_logits(hidden)
    judge = _Judge(batch, drafts, logits, certain)
    result = judge.result()  # the round's only device synchronisation, unless exits are probed
    told = tell_tokens(decoder, batch.rows, logits, [result.gained(row) for row in range(batch.num_rows)])
    agreement = {
        exit_layer: judge.agreement(decoder.own_logits(state, exit_layer), result.num_accepted)
        for exit_layer, state in {**drafts.exit_states, **states}.items()
    }
    end = watch.mark()
    return replace(
        result,
        confidences=drafts.confidences,
        agreement=agreement,
        certain=certain,
        logprobs=told,
        seconds_drafting=watch.between(start, middle),
        seconds_verifying=watch.between(middle, end),
    )


def _draft(batch: Batch, plan: Plan) -> tuple[Drafts, Sequence[Sequence[bool]]]:
    """Drafts by a plan, and for each whether it is certain, where rows have constraints."""
    if batch.guides is None:
        return _draft_freely(batch, plan), ()
    guided = _draft_guided(batch, plan)
    return guided.drafts, guided.certain


def _draft_guided(batch: Batch, plan: Plan) -> GuidedDrafts:
    """Drafts of rows of which some have a constraint."""
    match plan.source:
        case "layers":
            return draft_guided(batch, plan.exit_layer, batch.planned_lengths(plan), plan.probe, plan.stop)
        case "text":
            return draft_guided_text(batch, batch.matches(), batch.planned_lengths(plan))
        case _:
            return draft_forced(batch)


def _draft_freely(batch: Batch, plan: Plan) -> Drafts:
    """Drafts of rows without constraints."""
    match plan.source:
        case "layers":
            return draft_from_layers(batch, plan.exit_layer, batch.draft_lengths(plan), plan.probe, plan.stop)
        case "text":
            return draft_from_text(batch, batch.matches(), plan)
        case _:
            return Drafts(tokens=batch.pending()[:, :0], lengths=[0] * batch.num_rows)


class _Judge:
    """What the target says of the drafts, and of what other exits would have drafted."""

    def __init__(self, batch: Batch, drafts: Drafts, logits: Tensor, certain: Sequence[Sequence[bool]] = ()) -> None:
        self._batch, self._drafts, self._num_drafts, self._certain = batch, drafts, drafts.lengths, certain
        self._contexts, self._masks = None, None
        if batch.sampler.needs_context or batch.guides is not None:
            tokens = drafts.tokens.tolist()
            self._contexts = batch.contexts(tokens)
            self._masks = batch.masks([row[:number] for row, number in zip(tokens, drafts.lengths, strict=True)])
        self._first = [len(row.tokens) for row in batch.rows]
        self._vocabulary = batch.decoder.vocabulary
        self._scores = batch.sampler.scores(logits, self._contexts, self._masks)
        self._noise: Tensor | None = None
        self._targets = None if batch.by_distribution else self._choose(self._scores)

    def result(self) -> RoundResult:
        """Accepted drafts, and the token after them."""
        batch, drafts = self._batch, self._drafts
        length = drafts.tokens.shape[1]
        if self._targets is not None:
            both = torch.cat((drafts.tokens, self._targets), 1).tolist()
            return _matching([row[:length] for row in both], self._num_drafts, [row[length:] for row in both])
        drawn = draw_accepted(
            batch.sampler,
            drafts.tokens,
            torch.stack(drafts.probs, 1) if drafts.probs else self._scores[:, :0],
            self._vocabulary.softmax(self._scores),
            num_drafts=torch.tensor(self._num_drafts, device=self._scores.device),
            seeds=batch.seeds,
            first=self._first,
            counters=[row.recorder.rounds for row in batch.rows],
            block=batch.needs == "distributions",
        ).tolist()
        return RoundResult(
            drafts=[tuple(row[:number]) for row, number in zip(drawn, self._num_drafts, strict=True)],
            num_accepted=[row[-2] for row in drawn],
            tokens=[row[-1] for row in drawn],
        )

    def agreement(self, logits: Tensor, num_accepted: Sequence[int]) -> tuple[float, int]:
        """Tokens on which an exit agreed with the target, of how many: what follows a rejected draft doesn't count.

        Nor do tokens that were certain. Where distributions are compared, a token counts by the probability that its
        draft would have been accepted.
        """
        scores = self._batch.sampler.scores(logits, self._contexts, self._masks)
        if self._targets is None:
            softmax = self._vocabulary.softmax
            common = torch.minimum(softmax(scores).nan_to_num(), softmax(self._scores))  # NaN: the exit has no token
            agrees = self._vocabulary.sum(common)
        else:
            agrees = self._choose(scores) == self._targets
        counted = [row[: number + 1] for row, number in zip(agrees.tolist(), num_accepted, strict=True)]
        if self._certain:
            counted = [
                [agreed for agreed, sure in zip_longest(row, certain[: len(row)], fillvalue=False) if not sure]
                for row, certain in zip(counted, self._certain, strict=True)
            ]
        return float(sum(map(sum, counted))), sum(map(len, counted))

    def _choose(self, scores: Tensor) -> Tensor:
        """The target's choice, or an exit's: both with the same noise, which is drawn once."""
        sampler = self._batch.sampler
        if sampler.draw is None:
            return self._vocabulary.best(scores)
        if self._noise is None:
            start = self._vocabulary.tokens.start
            self._noise = noise_for(sampler.draw, scores, self._first, start=start)
        return self._vocabulary.best(add_noise(scores, self._noise, sampler.draw))


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
        first: Position in its sequence of each row's first draft.
        counters: Number of the round in each row: a position may come up in several rounds, each with fresh noise.
        block: Block verification, or one draft after the other.

    Returns:
        [B, K + 2]: the drafts, how many are accepted, and the token after them.
    """
    keys = [
        [make_key(seed, Purpose.ACCEPT, start + i, counter) for i in range(drafts.shape[1])]
        for seed, start, counter in zip(seeds, first, counters, strict=True)
    ]
    if drafts.shape[1] == 0:  # nothing to accept; the token is drawn just as in a batch where other rows have drafts
        accepted, probs = num_drafts, target_probs[:, 0]
    else:
        accept = accept_block if block else accept_rejection
        random = uniforms(keys, drafts.device)
        vocabulary = sampler.vocabulary_of(target_probs)
        accepted, probs = accept(drafts, draft_probs, target_probs, random, num_drafts, vocabulary)
    token = sampler.choose(probs.log().unsqueeze(1), first, Purpose.RESIDUAL, counters)
    return torch.cat((drafts, accepted.unsqueeze(1), token), 1)
