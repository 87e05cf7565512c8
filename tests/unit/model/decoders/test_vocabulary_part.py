"""Tokens chosen from parts of the vocabulary are those of the whole."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from layerskip.model.choosing.sampling import choose_among, filter_in_torch
from layerskip.model.draw import Draw

VOCAB = 1201
RULES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (0.7, 3000, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (8.0, 0, 0.97, 0.0),  # a nucleus of several hundred tokens
    (1.0, 0, 1.0, 0.05),
    (1.1, 40, 0.8, 0.02),
]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_filters_noise_and_probabilities(tmp_path: Path, num_ranks: int) -> None:
    cases: list[dict[str, list[float]] | None] = [None]
    for temperature, top_k, top_p, min_p in RULES:
        row = {"temperatures": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": 7}
        cases.append({name: [value, value] for name, value in row.items()})
        cases.append({name: [value, 0 if name == "temperatures" else value] for name, value in row.items()})
    found = run_ranks(tmp_path, num_ranks, "rank_work:choose", vocab=VOCAB, cases=cases)
    assert all(other == found[0] for other in found[1:])
    for index, (case, (tokens, probs)) in enumerate(zip(cases, found[0], strict=True)):
        generator = torch.Generator().manual_seed(index)
        logits = 3 * torch.randn(2, 3, VOCAB, generator=generator)
        draw = None if case is None else Draw(**{name: tuple(values) for name, values in case.items()})  # type: ignore[arg-type]
        scores = logits if draw is None else filter_in_torch(draw, logits)
        expected = choose_among(scores, draw, [5, 9])
        assert tokens == expected.tolist(), case
        wanted = scores.softmax(-1).gather(-1, expected.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(probs), wanted, rtol=1e-4, atol=1e-6)
