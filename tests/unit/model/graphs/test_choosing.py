"""Choices as functions of tensors: to the last bit those of the ordinary path in torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.sampler import make_draw
from layerskip.model.choosing.noise import Purpose, gumbel_in_torch, keys_on_device, make_key, signed
from layerskip.model.choosing.sampling import choose_tokens, filter_in_torch
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule, confidence_class
from layerskip.model.draw import Draw
from layerskip.model.finite import NO_TOKEN
from layerskip.model.graphs.choosing import choose, confidences, filtered, noise_after, rates_of
from layerskip.model.graphs.rows import NUM_COLUMNS, RowInputs, RowTensors, draws_of
from layerskip.model.native import sampling as native_sampling

CPU = torch.device("cpu")
SEEDS = [0, 1, 2**31, 2**63, 2**64 - 1, 2**64 + 5, 12_345_678_901_234_567_890]
RULES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 0.9, "top_k": 50},
    {"temperature": 0.9, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 0.6, "top_p": 0.001},
    {"temperature": 1.1, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 400, "top_p": 0.95, "min_p": 0.01},
]


@pytest.fixture(autouse=True)
def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary path as it runs on CUDA."""
    monkeypatch.setattr(native_sampling, "is_available", lambda: False)


def draw_for(rules: list[dict[str, Any]]) -> Draw | None:
    configs = [GenerationConfig(do_sample=each["temperature"] > 0, **each) for each in rules]
    return make_draw(configs, SEEDS[: len(rules)])


def rows_for(draw: Draw | None, positions: list[int], **rules: Any) -> RowTensors:
    inputs = RowInputs(len(positions) + 2, CPU)  # two rows without a sequence
    inputs.fill([0] * len(positions), positions, 500, draw=draw, **rules)
    return RowTensors.of(inputs.tensor)


def logits_for(num_rows: int, num_queries: int, size: int = 1003) -> Tensor:
    """With ties, and with tokens that a smaller head leaves out."""
    logits = (3 * torch.randn(num_rows, num_queries, size, generator=torch.Generator().manual_seed(0))).round(
        decimals=1
    )
    logits[:, :, 7::11] = -torch.inf
    return logits


def draws_by_kind() -> Iterator[Draw]:
    """All rules side by side, and each alone in all rows."""
    for rules in (RULES[:7], RULES[3:], *([rule] * 7 for rule in RULES[1:])):
        draw = draw_for(rules)
        assert draw is not None
        yield draw


def test_keys_are_those_of_the_host() -> None:
    positions = [[0, 1, 7, 4_000, 131_071]] * len(SEEDS)
    wanted = [
        [signed(make_key(seed, Purpose.TARGET, p)) for p in row] for seed, row in zip(SEEDS, positions, strict=True)
    ]
    seeds = torch.tensor([signed(seed) for seed in SEEDS])
    assert keys_on_device(seeds, torch.tensor(positions), Purpose.TARGET).tolist() == wanted
    others = keys_on_device(seeds, torch.tensor(positions), Purpose.DRAFT).tolist()
    assert not {key for row in others for key in row} & {key for row in wanted for key in row}


def test_noise_filters_and_choices_are_those_of_the_ordinary_path() -> None:
    logits, first = logits_for(7, 3), [0, 5, 9, 63, 64, 100, 499]
    for draw in draws_by_kind():
        rows = rows_for(draw, first)
        padded = torch.cat((logits, torch.zeros(2, 3, logits.shape[-1])))
        noise = noise_after(rows, 2, 3, logits.shape[-1])
        keys = [
            [make_key(seed, Purpose.TARGET, start + 3 + i) for i in range(3)]
            for seed, start in zip(SEEDS, first, strict=True)
        ]
        assert torch.equal(noise[:7], gumbel_in_torch(keys, logits.shape[-1], CPU))
        scores = filtered(padded, rows, draws_of(draw))
        assert torch.equal(scores[:7], filter_in_torch(draw, logits)), draw
        found = choose(scores, rows, noise)
        assert torch.equal(found[:7], choose_tokens(logits, draw, [start + 3 for start in first])), draw
        assert found[7:].tolist() == [[0] * 3] * 2


def test_greedy_rows_and_rows_without_a_finite_score() -> None:
    logits = logits_for(3, 1)
    logits[1] = torch.nan
    draw = Draw(temperatures=(0.0, 1.0, 0.0), top_k=(0, 5, 0), top_p=(1.0,) * 3, min_p=(0.0,) * 3, seeds=(1, 2, 3))
    rows = rows_for(draw, [3, 4, 5])
    padded = torch.cat((logits, torch.zeros(2, 1, logits.shape[-1])))
    found = choose(filtered(padded, rows, "filters"), rows, noise_after(rows, 0, 1, logits.shape[-1]))
    assert found[:3, 0].tolist() == [logits[0, 0].argmax().item(), NO_TOKEN, logits[2, 0].argmax().item()]


@pytest.mark.parametrize(
    ("rules", "kind"),
    [(RULES[:1], "no"), (RULES[:2], "noise"), (RULES[8:9], "noise"), (RULES[:3], "filters"), (RULES[5:6], "filters")],
)
def test_scores_are_sorted_only_where_a_row_needs_it(rules: list[dict[str, Any]], kind: str) -> None:
    assert draws_of(draw_for(rules)) == kind


def test_confidences_and_rates_are_those_of_the_host() -> None:
    draw = Draw(temperatures=(0.7,) * 4, top_k=(9,) * 4, top_p=(1.0,) * 4, min_p=(0.0,) * 4, seeds=(1, 2, 3, 4))
    logits, stop = logits_for(4, 1), StopRule(rates=tuple(i / 10 for i in range(CONFIDENCE_CLASSES)), least=0.1)
    rows = rows_for(draw, [0] * 4, stop=stop)
    scores = filter_in_torch(draw, logits)
    tokens = scores.argmax(-1)
    assert torch.equal(confidences(scores, tokens), scores.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    for part in torch.linspace(0, 1, 498).split(6):
        assert rates_of(part, rows).tolist()[:4] == [stop.rates[confidence_class(x)] for x in part.tolist()][:4]
    edges = torch.tensor([(i / 8) ** 0.5 for i in range(9)] + [torch.nan, 0.0, 1e-30])
    for part in edges.split(4):
        assert rates_of(torch.cat((part, part[:2])), rows).tolist()[:4] == [
            stop.rates[confidence_class(x)] for x in part.tolist()
        ]


def test_thresholds_are_the_hosts_to_the_last_bit() -> None:
    """The chance of a row's drafts, multiplied on the device, is the product that the host would compare."""
    stop = StopRule(rates=tuple(0.31 + 0.083 * i for i in range(CONFIDENCE_CLASSES)), least=0.1)
    generator = torch.Generator().manual_seed(1)
    rows, chance = rows_for(None, [0] * 4, stop=stop), torch.ones(6, dtype=torch.float64)
    seen: list[list[float]] = [[] for _ in range(6)]
    for _ in range(12):
        confidence = torch.rand(6, generator=generator)
        chance = chance * rates_of(confidence, rows)
        for row, value in enumerate(confidence.tolist()):
            seen[row].append(value)
        assert chance[:4].tolist() == [stop.chance(row) for row in seen[:4]]


def test_inputs_of_the_last_round_are_gone() -> None:
    """Rules that change, rows that leave, and tokens that only the device knows."""
    inputs, draw = RowInputs(3, CPU), draw_for(RULES[3:6])
    assert draw is not None
    inputs.fill([5, 6, 7], [1, 2, 3], 500, draw=draw, limits=[4, 5, 6])
    first = inputs.tensor.clone()
    inputs.fill(torch.tensor([[9]]), [8], 500)
    rows = RowTensors.of(inputs.tensor)
    assert rows.token.flatten().tolist() == [9, 0, 0]
    assert rows.first.tolist() == [8, 500, 500]
    for column in (rows.seeds, rows.top_k, rows.limits, rows.divisors, rows.min_p):
        assert not column.any()
    inputs.fill([5, 6, 7], [1, 2, 3], 500, draw=draw, limits=[4, 5, 6])
    assert torch.equal(inputs.tensor, first)
    assert inputs.tensor.shape == (3, NUM_COLUMNS)
