"""The compiled rules of sampling against those in torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.sampler import Sampler
from layerskip.model.choosing.noise import Purpose, gumbel_in_torch, make_key
from layerskip.model.choosing.sampling import choose_tokens
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, StopRule
from layerskip.model.draw import Draw
from layerskip.model.native import sampling as native_sampling

pytestmark = pytest.mark.skipif(not native_sampling.is_available(), reason="the compiled kernels weren't built")

RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 50},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"temperature": 3.0, "top_p": 0.999},  # more tokens than are sorted at first
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 400, "top_p": 0.95, "min_p": 0.01},
]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_equals_torchs_up_to_rounding() -> None:
    keys = [[make_key(seed, Purpose.TARGET, position) for position in (1, 7, 4000)] for seed in (0, 2**63)]
    wanted = gumbel_in_torch(keys, 32_003, torch.device("cpu"))
    torch.testing.assert_close(native_sampling.gumbel(keys, 32_003), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_filters_equal_torchs(rules: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, logits = Sampler([GenerationConfig(do_sample=True, **rules)] * 2, [0, 1]), random_logits(2, 3, 5_003)
    found = sampler.scores(logits)
    monkeypatch.setattr(native_sampling, "is_available", lambda: False)
    assert torch.equal(found, sampler.scores(logits))


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_network_draws_what_the_sampler_draws(tiny_checkpoint: Callable[..., Path], rules: dict[str, float]) -> None:
    decoder = layerskip.load(str(tiny_checkpoint()), kernels="native").decoder
    sampler = Sampler([GenerationConfig(do_sample=True, **rules)] * 2, [3, 2**64 + 5])
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    cache = decoder.new_cache(2, 60)
    positions = decoder.place(cache, cache.lengths, 40)
    found = decoder.choose(tokens, positions, cache, 0, 4, sampler.draw)
    logits = decoder.unembed(decoder.run_layers(decoder.embed(tokens), positions, cache, 0, 4))
    wanted = sampler.choose(sampler.scores(logits), [1, 1])
    assert torch.equal(found, wanted)


def test_a_network_samples_each_row_by_its_own_rules(tiny_checkpoint: Callable[..., Path]) -> None:
    """Rows of one block, those that take the likeliest token among them, as if each were alone."""
    decoder = layerskip.load(str(tiny_checkpoint()), kernels="native").decoder
    draw = Draw(
        temperatures=(0.0, 0.7, 1.0, 1.4),
        top_k=(7, 0, 5, 0),
        top_p=(0.5, 0.9, 1.0, 1.0),
        min_p=(0.1, 0.0, 0.0, 0.05),
        seeds=(1, 2, 3, 2),
    )
    tokens = torch.randint(0, 96, (4, 20), generator=torch.Generator().manual_seed(2))
    cache = decoder.new_cache(4, 40)
    positions = decoder.place(cache, cache.lengths, 20)
    logits = decoder.unembed(decoder.run_layers(decoder.embed(tokens), positions, cache, 0, 4))
    found = decoder.choose(tokens, positions, cache, 0, 4, draw)
    assert found is not None
    assert torch.equal(found, choose_tokens(logits, draw, [1] * 4))
    assert torch.equal(found[0], logits[0].argmax(-1))
    request = DraftRequest(exit_layer=2, num_drafts=6, draw=draw)
    drafts, greedy = (
        decoder.draft(tokens[:, :1], decoder.new_cache(4, 40), part)
        for part in (request, DraftRequest(exit_layer=2, num_drafts=6))
    )
    assert drafts is not None
    assert greedy is not None
    assert torch.equal(drafts.tokens[0], greedy.tokens[0])
    assert torch.equal(drafts.hidden[0], greedy.hidden[0])
    for row in range(1, 4):
        values = {name: value[row : row + 1] for name, value in vars(draw).items()}
        alone = DraftRequest(exit_layer=2, num_drafts=6, draw=Draw(**values))
        one = decoder.draft(tokens[row : row + 1, :1], decoder.new_cache(1, 40), alone)
        assert one is not None
        assert torch.equal(one.tokens[0], drafts.tokens[row])


@pytest.mark.parametrize("draft_vocabulary", [None, 40])
def test_drafts_are_drawn_with_their_places_noise(
    tiny_checkpoint: Callable[..., Path], draft_vocabulary: int | None
) -> None:
    options: dict[str, Any] = {} if draft_vocabulary is None else {"draft_vocabulary": draft_vocabulary}
    lm = layerskip.load(str(tiny_checkpoint()), kernels="native", **options)
    decoder = lm.decoder.drafter(2).decoder
    sampler = Sampler([GenerationConfig(do_sample=True, temperature=0.9, top_k=30)] * 2, [3, 4])
    cache, token = decoder.new_cache(2, 60), torch.tensor([[5], [6]])
    for row, length in enumerate((7, 9)):
        cache.commit(row, length)
    stop = StopRule(rates=(1.0,) * CONFIDENCE_CLASSES, least=0.0)
    request = DraftRequest(exit_layer=2, num_drafts=5, stop=stop, draw=sampler.draw)
    found = decoder.draft(token, cache, request)
    for i in range(5):
        positions = decoder.place(cache, [7 + i, 9 + i], 1)
        scores = sampler.scores(decoder.unembed(decoder.run_layers(decoder.embed(token), positions, cache, 0, 2)))
        token = sampler.choose(scores, [8 + i, 10 + i])
        assert torch.equal(found.tokens[:, i], token[:, 0])
        chosen = scores.softmax(-1).gather(-1, token.unsqueeze(-1)).flatten()
        torch.testing.assert_close(torch.tensor([row[i] for row in found.confidences]), chosen, rtol=1e-4, atol=1e-5)
