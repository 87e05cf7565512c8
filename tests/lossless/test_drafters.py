"""Every drafter and policy writes the tokens of autoregressive decoding, also when plans change between rounds."""

import random
from typing import Any

import pytest
from engines import generate

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.policy import BatchView, DraftSource, Plan, RoundResult
from layerskip.language_model import LanguageModel
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule

SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
REPEATING = [3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1, 4]


class Erratic:
    """Another plan for every round, at random; every other one with probes, some of several steps."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.pick = random.Random(seed)
        self.exits = tuple(range(1, num_layers))
        self.seen: list[Plan] = []
        self.prepared = self.stopped = self.rested = 0
        self.num_rows = 0

    def prepare(self, view: BatchView) -> None:
        self.prepared += view.num_rows

    def plan(self, view: BatchView) -> Plan:
        self.num_rows = view.num_rows
        assert len(view.samples) == len(view.matches()) == view.num_rows
        assert view.remaining > 0
        steps = self.pick.choice([0, 0, 0, 0, 0, 1, 2])
        if steps:
            return Plan(source="none", steps=steps)
        source: DraftSource = self.pick.choice(["none", "layers", "layers", "text"])
        exit_layer = self.pick.randrange(1, len(self.exits) + 2) if source == "layers" else 0
        stop = None
        if self.pick.random() < 0.5:
            rates = tuple(self.pick.random() for _ in range(CONFIDENCE_CLASSES))
            stop = StopRule(rates=rates, least=self.pick.random() / 2, kept=self.pick.choice([0.0, 0.3]))
        probe = self.exits if self.pick.random() < 0.5 else ()
        drafts = self.pick.randrange(1, 7)
        lengths = ()
        if self.pick.random() < 0.5:
            lengths = tuple(self.pick.randrange(drafts + 1) for _ in range(view.num_rows))
        plan = Plan(
            source=source,
            exit_layer=exit_layer,
            num_speculations=drafts,
            lengths=lengths,
            stop=stop,
            probe=probe,
        )
        self.seen.append(plan)
        return plan

    def observe(self, plan: Plan, result: RoundResult) -> None:
        if plan.steps:
            assert len(result.step_seconds) <= plan.steps  # fewer where steps were compiled on the way
            assert all(seconds > 0 for seconds in result.step_seconds)
            self.rested += 1
            return
        assert plan is self.seen[-1]
        assert len(result.num_accepted) == len(result.drafts) == len(result.tokens) == self.num_rows
        assert result.seconds > 0
        lengths = plan.lengths or [plan.num_speculations] * self.num_rows
        for row, length in enumerate(lengths):
            drafted = len(result.drafts[row])
            assert drafted <= length
            if result.confidences:
                assert drafted <= len(result.confidences[row]) <= drafted + 1
                assert all(0 < x <= 1.001 for x in result.confidences[row])
                self.stopped += drafted < length
        assert set(result.agreement) <= set(plan.probe)
        assert not plan.probe or set(result.agreement) >= {exit_ for exit_ in plan.probe if exit_ > plan.exit_layer}
        for agreed, tokens in result.agreement.values():
            assert 0 <= agreed <= tokens + 1e-4


def write(lm: LanguageModel, prompts: list[list[int]], policy: Any = None, **options: Any) -> list[list[int]]:
    return generate(lm.decoder, prompts, policy=policy, **options)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.2}], ids=["greedy", "coupled", "penalty"])
@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
def test_strategies(lm: LanguageModel, prompts: list[list[int]], strategy: str, options: dict[str, Any]) -> None:
    for texts in ([REPEATING], [*prompts, REPEATING]):
        expected = write(lm, texts, generation_strategy="autoregressive", max_new_tokens=40, **options)
        found = write(lm, texts, generation_strategy=strategy, max_new_tokens=40, num_speculations=5, **options)
        assert found == expected


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("seed", range(6))
def test_plans_that_change_every_round(
    lm: LanguageModel, prompts: list[list[int]], seed: int, options: dict[str, Any]
) -> None:
    texts = [*prompts, REPEATING]
    expected = write(lm, texts, generation_strategy="autoregressive", max_new_tokens=36, **options)
    policy = Erratic(seed, lm.decoder.num_layers)
    assert write(lm, texts, policy, max_new_tokens=36, **options) == expected
    assert len({(plan.source, plan.exit_layer) for plan in policy.seen}) > 3
    assert policy.prepared == len(texts)
    assert policy.rested > 0


def test_some_of_these_plans_stop_early(lm: LanguageModel, prompts: list[list[int]]) -> None:
    policies = [Erratic(seed, lm.decoder.num_layers) for seed in range(6)]
    for policy in policies:
        write(lm, prompts, policy, max_new_tokens=36)
    assert sum(policy.stopped > 0 for policy in policies) > 3


@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_short_texts(lm: LanguageModel, strategy: str, max_new_tokens: int) -> None:
    expected = write(lm, [REPEATING], generation_strategy="autoregressive", max_new_tokens=max_new_tokens)
    assert write(lm, [REPEATING], generation_strategy=strategy, max_new_tokens=max_new_tokens) == expected


@pytest.mark.parametrize("strategy", ["ngram", "adaptive"])
def test_ends_inside_drafts_and_full_caches(lm: LanguageModel, strategy: str) -> None:
    plain = write(lm, [REPEATING], generation_strategy="autoregressive", max_new_tokens=200)[0]
    assert len(plain) == lm.decoder.max_context - len(REPEATING)
    assert write(lm, [REPEATING], generation_strategy=strategy, max_new_tokens=200) == [plain]
    for stop in dict.fromkeys(plain[:30]):
        options = {"max_new_tokens": 40, "eos_token_ids": (stop,)}
        expected = write(lm, [REPEATING], generation_strategy="autoregressive", **options)
        assert write(lm, [REPEATING], generation_strategy=strategy, **options) == expected


def test_drafts_from_the_text_run_no_layers(lm: LanguageModel) -> None:
    """A round of n-gram drafts enters each layer once, however many tokens it adds."""
    config = GenerationConfig(generation_strategy="ngram", max_new_tokens=40, num_speculations=6)
    result = lm.generate([REPEATING], config)[0]
    assert result.stats.drafted > 0
    assert result.stats.layer_calls == (result.stats.rounds + 1) * lm.decoder.num_layers
