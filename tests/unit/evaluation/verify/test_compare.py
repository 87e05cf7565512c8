"""How a difference is judged: rounding makes near-ties, and anything else is an error."""

from collections.abc import Sequence
from typing import Any

import pytest

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.verify.compare import Divergence, compare


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")


def divergence(
    lm: layerskip.LanguageModel,
    config: GenerationConfig,
    context: Sequence[int],
    tokens: tuple[int, int],
    tolerance: float,
) -> Divergence:
    """Two texts that differ in the first token after a context."""
    difference = compare(lm, config, 0, context, [tokens[0]], [tokens[1]], tolerance)
    assert difference is not None
    assert (difference.position, difference.expected, difference.actual) == (0, *tokens)
    return difference


def test_equal_texts_have_no_divergence(lm: layerskip.LanguageModel) -> None:
    assert compare(lm, GenerationConfig(), 0, [5, 9], [3, 4], [3, 4], 1e-3) is None


def test_near_ties_are_told_from_errors(lm: layerskip.LanguageModel) -> None:
    context = [5, 9, 11]
    values, tokens = lm.logits(context)[-1].topk(2)
    gap = float(values[0] - values[1])
    greedy = GenerationConfig(do_sample=False)
    pair = (int(tokens[0]), int(tokens[1]))
    assert divergence(lm, greedy, context, pair, tolerance=gap).near_tie
    narrow = divergence(lm, greedy, context, pair, tolerance=gap / 4)
    assert not narrow.near_tie
    assert narrow.gap == narrow.top2_gap == pytest.approx(gap, rel=1e-4)


def test_tokens_at_the_border_of_top_p_may_be_near_ties(lm: layerskip.LanguageModel) -> None:
    """A token just outside the nucleus may be inside it after rounding; one far outside may not."""
    context = [7, 8]
    logits = lm.logits(context)[-1]
    probs, order = logits.softmax(-1).sort(descending=True)
    border = float(probs[:3].sum())
    config = GenerationConfig(top_p=border - 1e-6, temperature=1.0, seed=1)
    inside, outside, far = int(order[0]), int(order[3]), int(order[-1])
    assert divergence(lm, config, context, (inside, outside), tolerance=1e-3).gap is None  # filtered out as it stands
    assert not divergence(lm, config, context, (inside, far), tolerance=1e-3).near_tie
    seeds = [s for s in range(200) if _chosen(lm, context, s, border + 1e-5) == outside]
    assert seeds, "no seed chooses the token at the border"
    other = _chosen(lm, context, seeds[0], border - 1e-5)
    for top_p in (border - 1e-5, border + 1e-5):  # whichever side this network is on, the other one is as good
        config = GenerationConfig(top_p=top_p, temperature=1.0, seed=seeds[0])
        assert divergence(lm, config, context, (other, outside), tolerance=1e-3).near_tie
        assert not divergence(lm, config, context, (other, outside), tolerance=1e-7).near_tie


def _chosen(lm: layerskip.LanguageModel, context: list[int], seed: int, top_p: float) -> int:
    options = {"max_new_tokens": 1, "do_sample": True, "top_p": top_p, "seed": seed}
    return lm.generate([context], generation_strategy="autoregressive", **options)[0].token_ids[0]
