"""Filters and choices of each row by its own rules, against transformers' logits warpers and against rows alone."""

import itertools
from collections.abc import Sequence

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerskip.model.choosing.noise import Purpose, gumbel, make_key
from layerskip.model.choosing.sampling import choose_tokens, filter_in_torch, filter_scores
from layerskip.model.draw import Draw
from layerskip.model.finite import NO_TOKEN
from layerskip.model.native import sampling as native_sampling

Rules = tuple[float, int, float, float]
"""Temperature, top-k, top-p and min-p of a row."""
RULES: list[Rules] = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (0.0, 3, 0.5, 0.3),
    (0.9, 0, 1.0, 0.1),
    (0.8, 20, 0.9, 0.02),
]
rules = st.tuples(
    st.one_of(st.just(0.0), st.floats(0.05, 5.0)),
    st.one_of(st.just(0), st.integers(1, 200)),
    st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the compiled filters and noise, where they were built, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native_sampling, "is_available", lambda: False)


def draw_of(rows: Sequence[Rules], seeds: Sequence[int] | None = None) -> Draw:
    temperatures, top_k, top_p, min_p = zip(*rows, strict=True)
    seeds = range(len(rows)) if seeds is None else seeds
    return Draw(temperatures=temperatures, top_k=top_k, top_p=top_p, min_p=min_p, seeds=tuple(seeds))


def random_logits(*shape: int, seed: int = 0, ties: bool = False) -> Tensor:
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


def warped(logits: Tensor, row: Rules) -> Tensor:
    """[Q, V] by transformers."""
    temperature, top_k, top_p, min_p = row
    if temperature == 0:
        return logits
    warpers: list[transformers.LogitsProcessor] = [transformers.TemperatureLogitsWarper(float(temperature))]
    if top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    for warper in warpers:
        logits = warper(torch.empty((len(logits), 0), dtype=torch.long), logits)
    return logits


@given(
    st.lists(rules, min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 90), st.integers(0, 99), st.booleans()
)
def test_filters_in_torch_equal_transformers(
    rows: list[Rules], queries: int, vocab_size: int, seed: int, ties: bool
) -> None:
    logits = random_logits(len(rows), queries, vocab_size, seed=seed, ties=ties)
    before = logits.clone()
    scores = filter_in_torch(draw_of(rows), logits)
    assert torch.equal(scores, torch.stack([warped(part, row) for part, row in zip(logits, rows, strict=True)]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("rows", [RULES, RULES[3:4] * 5, [RULES[2], RULES[6]] * 3], ids=["all", "same", "two"])
def test_each_row_is_filtered_by_its_own_rules(way: None, rows: list[Rules]) -> None:
    logits = random_logits(len(rows), 3, 5_003)
    before = logits.clone()
    scores = filter_scores(draw_of(rows), logits)
    assert torch.equal(scores, torch.stack([warped(part, row) for part, row in zip(logits, rows, strict=True)]))
    assert torch.equal(logits, before)
    scores.zero_()  # never the caller's memory, not even for rows that stay as they are
    assert torch.equal(logits, before)


def test_each_row_is_chosen_as_if_it_were_alone(way: None) -> None:
    logits, first = random_logits(len(RULES), 4, 1_000), [5, 6, 7, 80, 9, 10, 11]
    seeds = [2**64 - 1 - row for row in range(len(RULES))]
    chosen = choose_tokens(logits, draw_of(RULES, seeds), first)
    for row, rule in enumerate(RULES):
        alone = choose_tokens(logits[row : row + 1], draw_of([rule], seeds[row : row + 1]), first[row : row + 1])
        assert torch.equal(chosen[row], alone[0])


def test_sampling_adds_the_noise_of_seed_and_position(way: None) -> None:
    logits, draw = random_logits(2, 3, 500), draw_of([RULES[6], RULES[1]], [7, 8])
    keys = [[make_key(seed, Purpose.TARGET, start + q) for q in range(3)] for seed, start in ((7, 40), (8, 2))]
    wanted = (filter_scores(draw, logits) + gumbel(keys, 500, logits.device)).argmax(-1)
    assert torch.equal(choose_tokens(logits, draw, [40, 2]), wanted)


def test_without_temperature_the_likeliest_is_taken(way: None) -> None:
    logits = random_logits(2, 3, 500)
    logits[:, :, 100] = logits[:, :, 400] = 50.0  # a tie: the first one
    for draw in (None, draw_of([RULES[0], RULES[4]])):
        assert torch.equal(choose_tokens(logits, draw, [0, 0]), torch.full((2, 3), 100))
    mixed = choose_tokens(logits, draw_of([RULES[2], RULES[4]]), [0, 0])
    assert mixed[1].tolist() == [100] * 3


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", RULES, ids=str)
def test_nothing_is_chosen_where_a_logit_is_not_finite(way: None, row: Rules, broken: float) -> None:
    for place in (0, 250, 499):
        logits = random_logits(2, 2, 500)
        logits[1, 0, place] = broken
        chosen = choose_tokens(logits, draw_of([RULES[1], row]), [0, 0])
        assert (chosen == NO_TOKEN).tolist() == [[False, False], [True, False]]


def test_structures_are_kept() -> None:
    if not native_sampling.is_available():
        pytest.skip("the compiled kernels weren't built")
    first, again = (native_sampling.sampling_view(draw_of(RULES)) for _ in range(2))
    assert first is again
    others = [draw_of(RULES[1:]), draw_of(RULES, range(1, 1 + len(RULES))), draw_of(RULES[::-1])]
    views = [first, *map(native_sampling.sampling_view, others)]
    assert all(a is not b for a, b in itertools.combinations(views, 2))
    assert [first.top_k[row] for row in range(len(RULES))] == [rule[1] for rule in RULES]
