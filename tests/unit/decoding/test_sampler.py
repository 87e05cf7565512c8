"""The sampler against transformers' own list of processors, and its draws."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rules.penalties import adjust, penalize
from layerskip.decoding.sampler import Sampler
from layerskip.model.choosing.noise import Purpose
from layerskip.model.native import sampling as native_sampling

VOCAB = 40
CONTEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 3, 1]

COMBINATIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((1.0, 0.6, 1.7), (0, 7), (1.0, 0.8), (0.0, 0.1))
]


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def rules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the compiled filters and noise, where they were built, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native_sampling, "is_available", lambda: False)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 3 * torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """Any model of transformers: it builds the list of processors."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))


def processed_by_transformers(model: LlamaForCausalLM, logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    config = transformers.GenerationConfig(**options)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(CONTEXT), device="cpu")
    return processors(torch.tensor([CONTEXT]), logits[0].clone())


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("context", [{}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}], ids=["", "context"])
def test_scores_equal_transformers(
    reference: LlamaForCausalLM, logits: torch.Tensor, options: dict[str, Any], context: dict[str, Any]
) -> None:
    sampler = Sampler([GenerationConfig(do_sample=True, **options, **context)], [0])
    before = logits.clone()
    scores = sampler.scores(logits, [[CONTEXT]])
    expected = processed_by_transformers(reference, logits, {"do_sample": True, **options, **context})
    assert torch.equal(scores[0], expected)
    assert torch.equal(logits, before)  # the caller's logits are untouched
    assert sampler.needs_context == bool(context)


def test_greedy_keeps_context_processors_only(reference: LlamaForCausalLM, logits: torch.Tensor) -> None:
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    sampler = Sampler([GenerationConfig(do_sample=False, temperature=0.5, top_k=3, **options)], [0])
    expected = processed_by_transformers(reference, logits, {"do_sample": False, **options})
    assert torch.equal(sampler.scores(logits, [[CONTEXT]])[0], expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=30),
    st.one_of(st.just(1.0), st.floats(0.1, 10.0)),
    st.integers(0, 6),
    st.integers(0, 99),
)
def test_penalties_equal_transformers(context: list[int], penalty: float, size: int, seed: int) -> None:
    logits = 3 * torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    ids, expected = torch.tensor([context]), logits.clone()
    if penalty != 1.0:
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, expected)
    if size > 0:
        expected = transformers.NoRepeatNGramLogitsProcessor(size)(ids, expected)
    penalize(logits[0], context, penalty, size)
    assert torch.equal(logits, expected)


def test_counts_are_those_of_generated_tokens() -> None:
    """score - count x frequency - (count > 0) x presence, by OpenAI's definition; biases come first."""
    config = GenerationConfig(
        do_sample=False, frequency_penalty=0.5, presence_penalty=-0.25, logit_bias={1: 3.0, 4: -2.0}
    )
    prompt, generated = [1, 1, 2], [4, 2, 4, 4]
    sampler = Sampler([config], [0], prompt_lengths=[len(prompt)])
    logits = torch.arange(6, dtype=torch.float32).view(1, 1, 6)
    scores = sampler.scores(logits, [[prompt + generated]])
    assert scores[0, 0].tolist() == [0.0, 1 + 3.0, 2 - 0.5 + 0.25, 3.0, 4 - 2.0 - 3 * 0.5 + 0.25, 5.0]
    assert logits[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert sampler.scores(logits, [[prompt]])[0, 0].tolist() == [0.0, 4.0, 2.0, 3.0, 2.0, 5.0]


def test_biases_alone_need_no_context() -> None:
    sampler = Sampler([GenerationConfig(logit_bias={1: 2.0}), GenerationConfig()], [0, 0])
    assert sampler.adjusts
    assert not sampler.needs_context
    scores = sampler.scores(torch.zeros(2, 2, 3))
    assert scores.tolist() == [[[0, 2, 0]] * 2, [[0, 0, 0]] * 2]


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(0, 12),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=4),
    st.integers(1, 9),
)
def test_a_part_of_the_vocabulary_gets_its_part_of_the_rules(
    context: list[int], prompt: int, frequency: float, presence: float, bias: dict[int, float], cut: int
) -> None:
    config = GenerationConfig(
        frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias, repetition_penalty=1.2
    )
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    whole, parts = logits.clone(), [logits[:cut].clone(), logits[cut:].clone()]
    adjust(whole, context, config, prompt_length=prompt)
    adjust(parts[0], context, config, prompt_length=prompt, first=0)
    adjust(parts[1], context, config, prompt_length=prompt, first=cut)
    assert torch.equal(torch.cat(parts), whole)


def test_each_position_sees_its_own_context() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32).expand(2, 2, VOCAB)
    sampler = Sampler([GenerationConfig(do_sample=False, no_repeat_ngram_size=2)] * 2, [0, 0])
    contexts = [[[39, 39], [39, 39, 38]], [[38, 39, 38, 38, 37, 38], [39, 38, 39]]]
    chosen = sampler.choose(sampler.scores(logits, contexts), [0, 0])
    assert chosen.tolist() == [[38, 39], [36, 39]]


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-7])
def test_temperature_0_takes_the_likeliest(logits: torch.Tensor, temperature: float) -> None:
    for seed in range(20):
        sampler = Sampler([GenerationConfig(do_sample=True, temperature=temperature, top_p=0.9)], [seed])
        assert sampler.draw is None
        assert torch.equal(sampler.scores(logits), logits)
        assert sampler.choose(sampler.scores(logits), [5]).item() == logits.argmax()


def test_filtered_tokens_are_never_drawn(logits: torch.Tensor) -> None:
    sampler = Sampler([GenerationConfig(temperature=5.0, top_k=3)] * 2000, range(2000))
    scores = sampler.scores(logits.expand(2000, 1, VOCAB))
    drawn = sampler.choose(scores, [4] * 2000)
    assert set(drawn.flatten().tolist()) == set(logits.flatten().topk(3).indices.tolist())


def test_draws_depend_on_seed_position_purpose_and_counter() -> None:
    configs = [GenerationConfig(do_sample=True)] * 2
    sampler, same_seeds = Sampler(configs, [7, 8]), Sampler(configs, [7, 7])
    scores = torch.zeros(2, 3, 1000)
    drawn = sampler.choose(scores, [10, 11])
    assert len(set(drawn.flatten().tolist())) == 6
    shifted = same_seeds.choose(scores, [11, 12])
    assert shifted[0, :2].tolist() == drawn[0, 1:].tolist()  # the place in the text counts, not that in the block
    assert shifted[1, 0] == drawn[0, 2]
    others = [
        sampler.choose(scores, [10, 11], Purpose.DRAFT),
        sampler.choose(scores, [10, 11], Purpose.TARGET, [1, 1]),
    ]
    assert all((other != drawn).any(-1).all() for other in others)
    assert torch.equal(sampler.choose(scores, [10, 11], Purpose.TARGET, [0, 0]), drawn)


def test_similar_distributions_draw_the_same_token_mostly() -> None:
    """The coupling: with shared noise, draft and target agree far more often than independent draws would."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4000, 1, 30, generator=generator) * 1.5
    draft = target + 0.3 * torch.randn(4000, 1, 30, generator=generator)
    sampler = Sampler([GenerationConfig(do_sample=True)] * 4000, range(4000))
    first = [6] * 4000
    same = (sampler.choose(target, first) == sampler.choose(draft, first)).double().mean()
    p, q = target.softmax(-1), draft.softmax(-1)
    best = torch.minimum(p, q).sum(-1).mean()
    independent = (p * q).sum(-1).mean()
    assert independent + 0.4 < same <= best + 0.01


def test_each_row_has_its_own_rules() -> None:
    """Filters, penalties and seeds: what a row gets beside others is what it gets alone."""
    rows: list[dict[str, Any]] = [
        {"do_sample": False},
        {"temperature": 0.7, "top_k": 5},
        {"do_sample": True, "top_p": 0.6, "repetition_penalty": 1.4},
        {"do_sample": False, "no_repeat_ngram_size": 2},
        {"temperature": 2.0, "min_p": 0.1},
    ]
    configs, seeds, first = [GenerationConfig(**row) for row in rows], [3, 1, 4, 1, 5], [9, 13, 8, 13, 20]
    logits = 3 * torch.randn(5, 2, VOCAB, generator=torch.Generator().manual_seed(1))
    contexts = [[CONTEXT, [*CONTEXT, 4 + i]] for i in range(5)]
    together = Sampler(configs, seeds)
    scores = together.scores(logits, contexts)
    chosen = together.choose(scores, first)
    for i, config in enumerate(configs):
        alone = Sampler([config], seeds[i : i + 1])
        expected = alone.scores(logits[i : i + 1], contexts[i : i + 1])
        assert torch.equal(scores[i : i + 1], expected)
        assert torch.equal(chosen[i : i + 1], alone.choose(expected, first[i : i + 1]))
    assert torch.equal(scores[0], logits[0])
    assert chosen[0].tolist() == logits[0].argmax(-1).tolist()


def test_only_rows_that_sample_are_drawn() -> None:
    draw = Sampler([GenerationConfig(), GenerationConfig(temperature=0.5, top_k=7, min_p=0.2)], [1, 2]).draw
    assert draw is not None
    assert (draw.temperatures, draw.top_k, draw.top_p, draw.min_p) == ((0.0, 0.5), (0, 7), (1.0, 1.0), (0.0, 0.2))
    assert draw.seeds == (1, 2)
    assert Sampler([GenerationConfig(), GenerationConfig(top_k=3, do_sample=False)], [1, 2]).draw is None
