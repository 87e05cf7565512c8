"""The lossless check finds what is lost, forgives rounding, and nothing else."""

from typing import Any

import pytest
import torch

import layerskip
from layerskip.decoding import self_speculative
from layerskip.decoding.batch import Batch, Round
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.drafting import Draft
from layerskip.decoding.self_speculative import Verification
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.lossless import judge, verify_lossless

CONFIG = GenerationConfig(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=3)
PROMPTS = [[5, 9, 11], [7, 8]]


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")


def test_equal_texts_are_counted_for_each_setting(lm: layerskip.LanguageModel) -> None:
    report = verify_lossless(lm, PROMPTS, [(1, 2), (3, 4)], config=CONFIG)
    assert [(s.exit_layer, s.num_speculations, s.mode) for s in report.settings] == [
        (1, 2, "greedy"),
        (3, 4, "greedy"),
        (1, 2, "coupled"),
        (3, 4, "coupled"),
    ]
    assert all((s.equal, s.near_ties, s.errors) == (2, 0, 0) for s in report.settings)
    assert all(s.tokens == 24 and s.drafted > 0 for s in report.settings)
    assert report.errors == 0


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_a_wrong_acceptance_rule_is_an_error(
    lm: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    honest = self_speculative.verify

    def accepts_all(batch: Batch, draft: Draft, exits: Any) -> Verification:
        rounds = honest(batch, draft, exits).rounds
        for row, result in enumerate(rounds):
            batch.cache.commit(row, len(result.drafts) - result.num_accepted)
        wrong = [Round(drafts=r.drafts, num_accepted=len(r.drafts), token=r.token) for r in rounds]
        return Verification(rounds=wrong)

    monkeypatch.setattr(self_speculative, "verify", accepts_all)
    report = verify_lossless(lm, PROMPTS, [(1, 4)], modes=(mode,), config=CONFIG)
    assert report.errors == 2
    first = report.settings[0].divergences[0]
    assert not first.near_tie
    assert first.expected != first.actual


def test_a_text_that_ends_early_is_an_error(lm: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lm.generate

    def cuts(prompts: Any, config: GenerationConfig) -> Any:
        results = honest(prompts, config)
        if config.speculates:
            for result in results:
                del result.token_ids[6:]
        return results

    monkeypatch.setattr(lm, "generate", cuts)
    report = verify_lossless(lm, PROMPTS, [(2, 2)], modes=("greedy",), config=CONFIG)
    assert report.errors == 2
    assert report.settings[0].divergences[0].position == 6
    assert report.settings[0].divergences[0].actual is None


def test_judge_tells_near_ties_from_errors(lm: layerskip.LanguageModel) -> None:
    context = [5, 9, 11]
    values, tokens = lm.logits(context)[-1].topk(2)
    gap = float(values[0] - values[1])
    greedy = GenerationConfig(do_sample=False)
    pair = (int(tokens[0]), int(tokens[1]))
    assert judge(lm, greedy, context, pair, tolerance=gap)[1]
    measured, near_tie = judge(lm, greedy, context, pair, tolerance=gap / 4)
    assert not near_tie
    assert measured == pytest.approx(gap, rel=1e-4)


def test_judge_looks_at_the_border_of_top_p(lm: layerskip.LanguageModel) -> None:
    """A token just outside the nucleus may be inside it after rounding; one far outside may not."""
    context = [7, 8]
    logits = lm.logits(context)[-1]
    probs, order = logits.softmax(-1).sort(descending=True)
    border = float(probs[:3].sum())
    config = GenerationConfig(top_p=border - 1e-6, temperature=1.0, seed=1)
    inside, outside, far = int(order[0]), int(order[3]), int(order[-1])
    gap, _ = judge(lm, config, context, (inside, outside), tolerance=1e-3)
    assert gap is None  # filtered out as it stands
    assert not judge(lm, config, context, (inside, far), tolerance=1e-3)[1]
    seeds = [s for s in range(200) if _chosen(lm, context, s, border + 1e-5) == outside]
    assert seeds, "no seed chooses the token at the border"
    other = _chosen(lm, context, seeds[0], border - 1e-5)
    for top_p in (border - 1e-5, border + 1e-5):  # whichever side this network is on, the other one is as good
        config = GenerationConfig(top_p=top_p, temperature=1.0, seed=seeds[0])
        assert judge(lm, config, context, (other, outside), tolerance=1e-3)[1]
        assert not judge(lm, config, context, (other, outside), tolerance=1e-7)[1]


def _chosen(lm: layerskip.LanguageModel, context: list[int], seed: int, top_p: float) -> int:
    options = {"max_new_tokens": 1, "do_sample": True, "top_p": top_p, "seed": seed}
    return lm.generate([context], generation_strategy="autoregressive", **options)[0].token_ids[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": [], "settings": [(1, 1)]},
        {"prompts": PROMPTS, "settings": []},
        {"prompts": PROMPTS, "settings": [(5, 1)]},
        {"prompts": PROMPTS, "settings": [(1, 0)]},
        {"prompts": PROMPTS, "settings": [(1, 1)], "batch_size": 0},
    ],
)
def test_bad_arguments(lm: layerskip.LanguageModel, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        verify_lossless(lm, **arguments)


def test_tolerance_is_stated_by_dtype(tiny_checkpoint: Any) -> None:
    model = layerskip.load(str(tiny_checkpoint()), dtype="bfloat16", device="cpu")
    report = verify_lossless(model, PROMPTS, [(2, 2)], modes=("greedy",), config=CONFIG)
    assert model.decoder.dtype == torch.bfloat16
    assert report.tolerance == 0.5
    assert report.errors == 0
