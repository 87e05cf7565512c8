"""Sampled texts depend on the seed alone, and are those of plain sampling with the same noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerskip.export.custom_generate.generate import generate
from layerskip.export.custom_generate.noise import gumbel, make_key
from layerskip.model.choosing import noise as our_noise

OPTIONS: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
}


def processors() -> LogitsProcessorList:
    """What transformers makes of `OPTIONS`."""
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.1),
            TemperatureLogitsWarper(1.3),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.95),
            MinPLogitsWarper(0.01),
        ]
    )


@torch.no_grad()
def plain_sampling(model: Any, ids: Tensor, seed: int, new_tokens: int) -> Tensor:
    """One token after another, without a cache, with this package's noise."""
    for _ in range(new_tokens):
        scores = processors()(ids, model(ids).logits[:, -1].float())
        key = our_noise.make_key(seed, our_noise.Purpose.TARGET, ids.shape[1])
        drawn = scores + our_noise.gumbel_in_torch([[key]], scores.shape[1], ids.device)[0]
        ids = torch.cat([ids, drawn.argmax(dim=1, keepdim=True)], dim=1)
    return ids


def sample(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return generate(ids, model=model, do_sample=True, max_new_tokens=30, pad_token_id=0, **OPTIONS, **options)


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 1])
def test_the_text_depends_on_the_seed_alone(seed: int, agreeing: Any, prompt: Callable[..., Tensor]) -> None:
    expected = plain_sampling(agreeing, prompt(), seed, 30)
    for exit_layer in (1, 2, 4):
        for drafts in (1, 4, 9):
            tokens = sample(agreeing, prompt(), exit_layer=exit_layer, num_speculations=drafts, seed=seed)
            assert torch.equal(tokens, expected), (exit_layer, drafts)


def test_seeds_differ(agreeing: Any, prompt: Callable[..., Tensor]) -> None:
    texts = {tuple(sample(agreeing, prompt(), exit_layer=2, seed=seed)[0].tolist()) for seed in range(4)}
    assert len(texts) == 4


def test_each_row_samples_as_it_does_alone(agreeing: Any, prompt: Callable[..., Tensor]) -> None:
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 30, "pad_token_id": 0}
    together = generate(ids, model=agreeing, attention_mask=mask, exit_layer=3, seed=5, **options)
    for row, padding in enumerate((0, 4, 0)):
        alone = generate(ids[row : row + 1, padding:], model=agreeing, exit_layer=1, seed=5, **options)
        assert together[row, padding:].tolist() == alone[0].tolist()


def test_without_a_seed_torchs_random_numbers_choose_it(agreeing: Any, prompt: Callable[..., Tensor]) -> None:
    texts = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        texts.append(sample(agreeing, prompt(), exit_layer=2).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_the_noise_is_the_packages() -> None:
    keys = [[our_noise.make_key(seed, our_noise.Purpose.TARGET, position) for position in (0, 5)] for seed in (3, -1)]
    assert keys == [[make_key(seed, position) for position in (0, 5)] for seed in (3, -1)]
    device = torch.device("cpu")
    assert torch.equal(gumbel(keys, 1000, device), our_noise.gumbel_in_torch(keys, 1000, device))
