"""Rejection sampling end to end: what a tiny network's first round drafts has the target's joint distribution."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from constraints import Maze
from engines import drain, start
from scipy.stats import chisquare
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rounds import verifying
from layerskip.decoding.rules.guide import Guide
from layerskip.decoding.sampler import Sampler
from layerskip.language_model import LanguageModel

VOCAB, ROWS, BATCHES = 12, 500, 40
PROMPT = [1, 2, 7, 1, 3, 8, 1, 4, 9, 1]  # after 2, 3 and 4, n-grams have drafts


@pytest.fixture(scope="module")
def small(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    return make_lm(vocab=VOCAB, width=16, layers=3, early=1, late=0.8, context=16, sharpness=1.5)


def exact_pairs(lm: LanguageModel, config: GenerationConfig, maze: Maze | None = None) -> Tensor:
    """[V, V], joint probability of tokens 1 and 2 after the prompt (token 0 is the prefill's, and summed over)."""
    sampler = Sampler([config], [0], prompt_lengths=[len(PROMPT)])

    def probs(tokens: list[int]) -> Tensor:
        masks = None
        if maze is not None:
            guide = Guide(maze.fresh(), frozenset(), VOCAB)
            masks = [[guide.at(tokens[len(PROMPT) :])]]
        return sampler.scores(lm.logits(tokens)[None, -1:], [[tokens]], masks).softmax(-1)[0, 0].double()

    pairs = torch.zeros(VOCAB, VOCAB, dtype=torch.double)
    first = probs(PROMPT)
    for a in first.nonzero().flatten().tolist():
        second = probs([*PROMPT, a])
        for b in second.nonzero().flatten().tolist():
            pairs[b] += first[a] * second[b] * probs([*PROMPT, a, b])
    return pairs


def drawn_pairs(
    lm: LanguageModel, config: GenerationConfig, maze: Maze | None = None, texts: Sequence[Sequence[int]] = ()
) -> Tensor:
    """[V, V], how often tokens 1 and 2 of many rows, each with a seed of its own, were which pair.

    Args:
        lm: The model.
        config: How to decode.
        maze: Says what may be drawn.
        texts: Of other requests, which draft.
    """
    outputs: list[list[int]] = []
    for number in range(BATCHES):
        constraints = None if maze is None else [maze.fresh() for _ in range(ROWS)]
        first_seed = number * ROWS + (10**6 if texts else 0)
        seeds = range(first_seed, first_seed + ROWS)
        engine = start(
            lm.decoder,
            [PROMPT] * ROWS,
            config,
            seeds=seeds,
            constraints=constraints,
            shares_suffixes=bool(texts),
        )
        rows = engine.rows
        for text in texts:
            assert engine._suffixes is not None
            engine._suffixes.add(text)
        drain(engine)
        assert not texts or sum(row.recorder.drafted_by.get("ngram", 0) for row in rows) > ROWS
        outputs += [row.output[:3] for row in rows]
    chosen = torch.tensor(outputs)
    counts = torch.zeros(VOCAB, VOCAB)
    return counts.index_put_((chosen[:, 1], chosen[:, 2]), torch.ones(len(chosen)), accumulate=True)


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square test, cells with fewer than 5 expected draws pooled."""
    counts, expected = counts.flatten().double(), probs.flatten() / probs.sum() * counts.sum()
    assert not counts[expected == 0].any(), "a token that the target never gives"
    large = expected >= 5
    pooled = [torch.cat((x[large], x[~large].sum()[None])) for x in (counts, expected)]
    keep = pooled[1] > 0
    return float(chisquare(pooled[0][keep].numpy(), pooled[1][keep].numpy()).pvalue)


def joint_p_value(
    lm: LanguageModel, options: dict[str, Any], maze: Maze | None = None, texts: Sequence[Sequence[int]] = ()
) -> float:
    """P-value of the two tokens after the first."""
    config = GenerationConfig(
        max_new_tokens=4, num_speculations=2, exit_layer=1, acceptance="rejection", do_sample=True, **options
    )
    return p_value(drawn_pairs(lm, config, maze, texts), exact_pairs(lm, config, maze))


MODES: list[dict[str, Any]] = [
    {"block_verification": False},
    {"block_verification": True, "top_k": 5, "temperature": 1.3},
    {"block_verification": False, "top_p": 0.8},
    {"generation_strategy": "ngram", "block_verification": True},
    {"generation_strategy": "ngram", "block_verification": False, "top_k": 6},
    {"generation_strategy": "adaptive"},
    {"frequency_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {2: 1.5, 7: -2.0}},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_tokens_are_distributed_as_the_targets(small: LanguageModel, options: dict[str, Any]) -> None:
    assert joint_p_value(small, options) > 0.01


@pytest.mark.parametrize("options", [*MODES[:2], *MODES[3:5]], ids=str)
def test_tokens_under_a_constraint_are_distributed_as_the_targets(
    small: LanguageModel, options: dict[str, Any]
) -> None:
    """The target's distribution, of which only the allowed tokens are kept; after some tokens, only one is."""
    assert joint_p_value(small, options, Maze(11, VOCAB, forced=0.3)) > 0.01


@pytest.mark.parametrize("block_verification", [False, True])
def test_texts_of_other_requests_do_not_change_the_distribution(small: LanguageModel, block_verification: bool) -> None:
    """Though what they draft depends on what was drawn first."""
    texts = [[*PROMPT[-5:], first, (first * 5 + 2) % VOCAB, first, 3] for first in range(VOCAB)]
    options = {"generation_strategy": "ngram", "block_verification": block_verification}
    assert joint_p_value(small, options, texts=texts) > 0.01


def test_a_biased_rule_is_noticed(small: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(
        drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor, num: Tensor, *_: Any
    ) -> Any:
        return num, target_probs[torch.arange(len(num)), num]

    monkeypatch.setattr(verifying, "accept_block", always)
    assert joint_p_value(small, {}) < 1e-6
