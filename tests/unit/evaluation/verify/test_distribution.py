"""The distribution test passes the engine's rejection sampling and fails biased rules."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rounds.verifying import draw_accepted
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.verify.distribution import verify_distribution

PROMPT = [5, 9, 11]
FILTERS = [{"temperature": 0.9}, {"temperature": 0.9, "top_k": 8}, {"temperature": 0.9, "top_p": 0.8}]


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(tiny_checkpoint(vocab_size=24)), dtype="float32", device="cpu")


@pytest.mark.parametrize("block", [False, True], ids=["plain", "block"])
@pytest.mark.parametrize("options", FILTERS, ids=["all", "top_k", "top_p"])
def test_rejection_sampling_draws_from_the_target(
    lm: layerskip.LanguageModel, options: dict[str, Any], block: bool
) -> None:
    report = verify_distribution(lm, PROMPT, GenerationConfig(**options), 2, block=block, draws=50_000)
    assert report.p_value > 0.01
    assert report.cells > 10
    assert 0.05 < report.acceptance_rate < 0.95


@pytest.mark.parametrize("block", [False, True], ids=["plain", "block"])
def test_a_biased_rule_is_rejected(lm: layerskip.LanguageModel, block: bool) -> None:
    def too_generous(sampler: Any, drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, **options: Any) -> Tensor:
        lenient = torch.cat(((target_probs[:, :-1] * 1.2).clamp(max=1), target_probs[:, -1:]), 1)
        return draw_accepted(sampler, drafts, draft_probs, lenient, **options)

    config = GenerationConfig(temperature=0.9)
    report = verify_distribution(lm, PROMPT, config, 2, block=block, draws=20_000, accept=too_generous)
    assert report.p_value < 1e-6
    assert not report.passed


def test_noise_that_is_used_twice_is_rejected(lm: layerskip.LanguageModel) -> None:
    """Drawing corrections from the target itself, not from what the draft left over, is the classic mistake."""

    def no_residual(sampler: Any, drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, **options: Any) -> Tensor:
        result = draw_accepted(sampler, drafts, draft_probs, target_probs, **options)
        rows = torch.arange(len(drafts))
        scores = target_probs[rows, result[:, 2].clamp(max=1)].log().unsqueeze(1)
        token = sampler.choose(scores, options["first"], counters=[7] * len(drafts))
        return torch.cat((result[:, :3], token), 1)

    config = GenerationConfig(temperature=0.9)
    report = verify_distribution(lm, PROMPT, config, 2, block=False, draws=20_000, accept=no_residual)
    assert not report.passed


def test_bad_arguments(lm: layerskip.LanguageModel) -> None:
    with pytest.raises(InvalidArgumentError, match="temperature"):
        verify_distribution(lm, PROMPT, GenerationConfig(do_sample=False), 2, block=True)
    with pytest.raises(InvalidArgumentError, match="1000"):
        verify_distribution(lm, PROMPT, GenerationConfig(temperature=0.9), 2, block=True, draws=10)
    with pytest.raises(InvalidArgumentError, match="exit_layer"):
        verify_distribution(lm, PROMPT, GenerationConfig(temperature=0.9), 9, block=True)
