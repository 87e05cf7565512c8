"""Which drafts to accept: pure functions, each lossless in its own sense.

Shapes: B rows, K drafts a row, V vocabulary. Row b uses its first `num_drafts[b]` drafts only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.choosing.sampling import Vocabulary, WholeVocabulary


def accept_matching(drafts: Sequence[int], targets: Sequence[int]) -> int:
    """Accept the longest prefix of drafts that the target chose too.

    With argmax choices this is greedy decoding; with choices that share their Gumbel noise (`noise.gumbel`) it is the
    text of autoregressive sampling, token for token. Source: arXiv:2404.16710, section 3.3; arXiv:2408.07978.

    Args:
        drafts: K token ids of one row.
        targets: K + 1, the target's choice at each position, given the drafts before it.

    Returns:
        Accepted drafts; the token after them is `targets[accepted]`.
    """
    return next((i for i, draft in enumerate(drafts) if draft != targets[i]), len(drafts))


def accept_rejection(
    drafts: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    num_drafts: Tensor,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafts one by one with probability min(1, target / draft) until the first rejection.

    Source: arXiv:2211.17192, algorithm 1.

    Args:
        drafts: [B, K] token ids, drawn from `draft_probs`.
        draft_probs: [B, K, V].
        target_probs: [B, K + 1, V].
        uniforms: [B, K], independent in [0, 1).
        num_drafts: [B].
        vocabulary: The tokens that probabilities are of; all if not given.

    Returns:
        [B] accepted drafts, and [B, V] the distribution of the token after them.
    """
    vocabulary = vocabulary or WholeVocabulary(target_probs.shape[-1])
    usable = _usable(drafts, num_drafts)
    chosen_target = vocabulary.at(target_probs[:, :-1], drafts)
    chosen_draft = vocabulary.at(draft_probs, drafts)
    accepted = ((uniforms * chosen_draft < chosen_target) & usable).cumprod(1).sum(1)
    weights = torch.ones_like(chosen_target)
    return accepted, _next_probs(accepted, num_drafts, weights, draft_probs, target_probs, vocabulary)


def accept_block(
    drafts: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    num_drafts: Tensor,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix that passes a test of the block as a whole; keeps at least as many drafts on average.

    Arguments and result are those of `accept_rejection`. Source: arXiv:2403.10444, algorithm 2.
    """
    vocabulary = vocabulary or WholeVocabulary(target_probs.shape[-1])
    num_rows, length = drafts.shape
    ratios = vocabulary.at(target_probs[:, :-1], drafts) / vocabulary.at(draft_probs, drafts)
    weights = torch.ones((num_rows, length + 1), dtype=target_probs.dtype, device=drafts.device)
    for i in range(length):  # the weight of a prefix: min(1, weight of the shorter one x ratio)
        weights[:, i + 1] = (weights[:, i] * ratios[:, i]).clamp(max=1)
    last = weights[:, 1:]
    # Prefixes of 1..K-1 drafts; a row's full block passes with its weight itself.
    excess = vocabulary.sum((last[:, :-1, None] * target_probs[:, 1:-1] - draft_probs[:, 1:]).clamp(min=0))
    slack = excess + 1 - last[:, :-1]
    passing = torch.where(slack > 0, excess / slack, torch.ones_like(slack))
    thresholds = torch.cat((passing, last[:, -1:]), 1)
    lengths = torch.arange(1, length + 1, device=drafts.device)
    thresholds = torch.where(lengths == num_drafts[:, None], last, thresholds)
    passed = (uniforms < thresholds) & _usable(drafts, num_drafts)
    accepted = (passed * lengths).amax(1)
    return accepted, _next_probs(accepted, num_drafts, weights, draft_probs, target_probs, vocabulary)


def _next_probs(
    accepted: Tensor,
    num_drafts: Tensor,
    weights: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    vocabulary: Vocabulary,
) -> Tensor:
    """Distribution after the accepted prefix: the target's, or where a draft was rejected, what the draft left over."""
    rows = torch.arange(len(accepted), device=accepted.device)
    target = target_probs[rows, accepted]
    at = accepted.clamp(max=draft_probs.shape[1] - 1)
    weight = weights[rows, at.clamp(max=weights.shape[1] - 1)]
    residual = (weight[:, None] * target - draft_probs[rows, at]).clamp(min=0)
    total = vocabulary.sum(residual).unsqueeze(-1)
    # A residual of nothing means that target and draft are equal up to rounding: then the target itself is right.
    use_target = (accepted >= num_drafts)[:, None] | (total <= 0)
    return torch.where(use_target, target, residual / total.clamp(min=torch.finfo(total.dtype).tiny))


def _usable(drafts: Tensor, num_drafts: Tensor) -> Tensor:
    return torch.arange(drafts.shape[1], device=drafts.device) < num_drafts[:, None]
