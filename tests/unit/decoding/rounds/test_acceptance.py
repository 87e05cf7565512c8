"""Acceptance rules: lossless in distribution (chi-square against exact probabilities), and what they accept.

Shapes: N draws, K drafts, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rounds.acceptance import accept_block, accept_matching, accept_rejection
from layerskip.decoding.sampler import Sampler

DRAWS, LENGTH, VOCAB = 60_000, 3, 12
Accept = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FILTERS: dict[str, dict[str, Any]] = {
    "unfiltered": {"do_sample": True},
    "top-k": {"temperature": 1.2, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.8},
}


def chains(filters: dict[str, Any], seed: int = 3, similarity: float = 0.4) -> tuple[Tensor, Tensor]:
    """Two Markov chains [V, V], draft and target: row t is the distribution after token t."""
    generator = torch.Generator().manual_seed(seed)
    target = 1.5 * torch.randn(1, VOCAB, VOCAB, generator=generator)
    other = 1.5 * torch.randn(1, VOCAB, VOCAB, generator=generator)
    sampler = Sampler([GenerationConfig(**filters)], [0])
    draft = similarity * target + (1 - similarity) * other
    return sampler.scores(draft).softmax(-1)[0], sampler.scores(target).softmax(-1)[0]


def sample(probs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def run(
    accept: Accept, draft: Tensor, target: Tensor, *, ragged: bool = False, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft K tokens after token 0, accept, correct, and write on with the target.

    Returns:
        [N, K + 1] tokens written, [N] accepted drafts, [N] usable drafts.
    """
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(DRAWS, dtype=torch.long)
    drafts, draft_probs, target_probs = [], [], [target[state]]
    for _ in range(LENGTH):
        draft_probs.append(draft[state])
        state = sample(draft_probs[-1], generator)
        drafts.append(state)
        target_probs.append(target[state])
    num_drafts = torch.full((DRAWS,), LENGTH)
    if ragged:
        num_drafts = torch.randint(0, LENGTH + 1, (DRAWS,), generator=generator)
    uniforms = torch.rand(DRAWS, LENGTH, generator=generator, dtype=torch.float64)
    tokens = torch.stack(drafts, 1)
    accepted, probs = accept(tokens, torch.stack(draft_probs, 1), torch.stack(target_probs, 1), uniforms, num_drafts)
    torch.testing.assert_close(probs.sum(-1), torch.ones(DRAWS))
    following = sample(probs, generator)
    written: list[Tensor] = []
    for i in range(LENGTH + 1):
        free = sample(target[written[-1]], generator) if written else following
        kept = tokens[:, min(i, LENGTH - 1)]
        written.append(torch.where(i < accepted, kept, torch.where(i == accepted, following, free)))
    return torch.stack(written, 1), accepted, num_drafts


def p_value(written: Tensor, target: Tensor) -> float:
    """Chi-square test of the first two tokens against target[0, a] * target[a, b]; rare pairs are pooled."""
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.double)
    counts.index_put_((written[:, 0], written[:, 1]), torch.ones(len(written), dtype=torch.double), accumulate=True)
    expected = (target[0, :, None] * target).double()
    assert not counts[expected == 0].any(), "a pair that the target never gives"
    expected *= len(written) / expected.sum()
    large = expected >= 5
    pooled = [torch.cat((x[large], x[~large].sum()[None])) for x in (counts, expected)]
    occurs = pooled[1] > 0
    return float(chisquare(pooled[0][occurs].numpy(), pooled[1][occurs].numpy(), sum_check=False).pvalue)


@pytest.mark.parametrize("accept", [accept_rejection, accept_block])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("filters", FILTERS)
def test_joint_distribution_is_the_targets(accept: Accept, ragged: bool, filters: str) -> None:
    draft, target = chains(FILTERS[filters])
    written, accepted, num_drafts = run(accept, draft, target, ragged=ragged)
    assert p_value(written, target) > 0.01
    assert (accepted <= num_drafts).all()
    assert set(accepted.tolist()) == {0, 1, 2, 3}


def test_the_drafts_alone_have_another_distribution() -> None:
    """Otherwise the test above would pass with anything."""
    draft, target = chains(FILTERS["unfiltered"])
    written, _, _ = run(lambda d, q, p, u, n: (n, p[torch.arange(len(n)), n]), draft, target)
    assert p_value(written, target) < 1e-6


def square_root(drafts: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts with probability min(1, sqrt(target / draft)); otherwise as it should be."""
    softened = target.clone()
    softened[:, :-1] = (target[:, :-1] * draft).sqrt()
    accepted, _ = accept_rejection(drafts, draft, softened, uniforms, num)
    _, probs = next_after(accepted, draft, target)
    return accepted, probs


def no_residual(drafts: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts as it should, and draws the correction from the target instead of the residual."""
    accepted, _ = accept_rejection(drafts, draft, target, uniforms, num)
    return accepted, target[torch.arange(len(num)), accepted]


def no_residual_block(
    drafts: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, num: Tensor
) -> tuple[Tensor, Tensor]:
    accepted, _ = accept_block(drafts, draft, target, uniforms, num)
    return accepted, target[torch.arange(len(num)), accepted]


def plain_residual_block(
    drafts: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, num: Tensor
) -> tuple[Tensor, Tensor]:
    """Accepts as a block, and draws the correction as if drafts had been accepted one by one."""
    accepted, _ = accept_block(drafts, draft, target, uniforms, num)
    return next_after(accepted, draft, target)


def next_after(accepted: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The residual of plain rejection sampling, written out anew."""
    rows = torch.arange(len(accepted))
    wanted = target[rows, accepted]
    residual = (wanted - draft[rows, accepted.clamp(max=LENGTH - 1)]).clamp(min=0)
    residual = residual / residual.sum(-1, keepdim=True)
    return accepted, torch.where((accepted == LENGTH)[:, None], wanted, residual)


@pytest.mark.parametrize("biased", [square_root, no_residual, no_residual_block, plain_residual_block])
def test_a_biased_rule_is_noticed(biased: Accept) -> None:
    draft, target = chains(FILTERS["unfiltered"])
    written, _, _ = run(biased, draft, target)
    assert p_value(written, target) < 1e-6


def test_an_unbiased_rule_written_anew_passes() -> None:
    """Guards the helpers of the biased rules: with the right acceptance, they pass the test."""
    draft, target = chains(FILTERS["unfiltered"])

    def rule(drafts: Tensor, q: Tensor, p: Tensor, uniforms: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
        return next_after(accept_rejection(drafts, q, p, uniforms, num)[0], q, p)

    written, _, _ = run(rule, draft, target)
    assert p_value(written, target) > 0.01


def test_plain_acceptance_has_its_known_rate() -> None:
    """The first draft is kept with probability 1 - total variation: the sum of min(draft, target)."""
    draft, target = chains(FILTERS["unfiltered"])
    _, accepted, _ = run(accept_rejection, draft, target)
    expected = float(torch.minimum(draft[0], target[0]).sum())
    assert float((accepted > 0).double().mean()) == pytest.approx(expected, abs=4 * 0.5 / DRAWS**0.5)


def test_a_block_keeps_more_drafts() -> None:
    gains = []
    for seed in range(5):
        draft, target = chains(FILTERS["unfiltered"], seed=seed)
        plain = run(accept_rejection, draft, target)[1].double().mean()
        block = run(accept_block, draft, target)[1].double().mean()
        gains.append(float(block - plain))
    assert min(gains) > -0.005  # at least as many, up to the noise of the draws
    assert sum(gains) / 5 > 0.02


def test_a_block_keeps_the_expected_number_of_drafts() -> None:
    """Theorem 2 of arXiv:2403.10444: the mean is the sum over prefixes of sum(min over the prefix's two measures)."""
    draft, target = chains(FILTERS["unfiltered"], seed=2)
    _, accepted, _ = run(accept_block, draft, target)
    expected = 0.0
    joint_draft, weight, state = torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.long)
    for _ in range(LENGTH):
        ratio = (weight[:, None] * target[state] / draft[state]).clamp(max=1)
        joint_draft = (joint_draft[:, None] * draft[state]).flatten()
        weight, state = ratio.flatten(), torch.arange(VOCAB).repeat(len(state))
        expected += float((joint_draft * weight).sum())
    assert float(accepted.double().mean()) == pytest.approx(expected, abs=4 * 1.5 / DRAWS**0.5)


@pytest.mark.parametrize("accept", [accept_rejection, accept_block])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_a_perfect_draft_is_accepted_whole(accept: Accept, ragged: bool) -> None:
    _, target = chains(FILTERS["unfiltered"])
    written, accepted, num_drafts = run(accept, target, target, ragged=ragged)
    assert torch.equal(accepted, num_drafts)
    assert p_value(written, target) > 0.01


@pytest.mark.parametrize("accept", [accept_rejection, accept_block])
def test_disjoint_drafts_are_all_refused(accept: Accept) -> None:
    """A draft that the target never gives goes even with the luckiest uniform, and the correction is the target's."""
    draft, target = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.25, 0.75])
    for uniform in (0.0, 0.5):
        accepted, probs = accept(
            torch.tensor([[0, 1]]),
            draft.expand(1, 2, 4),
            target.expand(1, 3, 4),
            torch.full((1, 2), uniform, dtype=torch.float64),
            torch.tensor([2]),
        )
        assert accepted.tolist() == [0]
        torch.testing.assert_close(probs[0], target)


@pytest.mark.parametrize("accept", [accept_rejection, accept_block])
def test_one_hot_distributions_compare_tokens(accept: Accept) -> None:
    """Temperature 0 as a limit: drafts are accepted as far as they are the target's tokens."""
    eye = torch.eye(5)
    drafts, targets = (
        torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]),
        torch.tensor([[1, 2, 3, 4], [1, 4, 3, 0], [0, 2, 3, 4]]),
    )
    accepted, probs = accept(
        drafts, eye[drafts], eye[targets], torch.rand(3, 3, dtype=torch.float64), torch.tensor([3, 3, 3])
    )
    assert accepted.tolist() == [3, 1, 0]
    assert probs.argmax(-1).tolist() == [4, 4, 0]
    torch.testing.assert_close(probs.amax(-1), torch.ones(3))


def test_matching_accepts_the_longest_equal_prefix() -> None:
    assert accept_matching([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accept_matching([1, 2, 3], [1, 2, 9, 4]) == 2
    assert accept_matching([1, 2, 3], [1, 9, 3, 4]) == 1
    assert accept_matching([9, 2, 3], [1, 2, 3, 4]) == 0
    assert accept_matching([1, 2], [1, 2, 3, 4]) == 2
    assert accept_matching([], [4]) == 0


@pytest.mark.parametrize("accept", [accept_rejection, accept_block])
def test_unusable_drafts_make_no_difference(accept: Accept) -> None:
    """What stands behind a row's drafts, garbage included, changes neither its acceptance nor its distribution."""
    generator = torch.Generator().manual_seed(3)
    draft, target = chains(FILTERS["unfiltered"])
    drafts = torch.randint(0, VOCAB, (500, 3), generator=generator)
    uniforms = torch.rand(500, 3, generator=generator, dtype=torch.float64)
    draft_probs, target_probs = draft[torch.randint(0, VOCAB, (500, 3))], target[torch.randint(0, VOCAB, (500, 4))]
    short = accept(drafts[:, :2], draft_probs[:, :2], target_probs[:, :3], uniforms[:, :2], torch.full((500,), 2))
    garbage = target_probs.clone()
    garbage[:, 3] = torch.nan
    long = accept(drafts, draft_probs, garbage, uniforms, torch.full((500,), 2))
    assert torch.equal(short[0], long[0])
    torch.testing.assert_close(short[1], long[1])
