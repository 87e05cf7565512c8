"""Counter-based random numbers: their distribution, their independence, and that seeds keep their meaning."""

import pytest
import torch
from scipy.stats import chisquare, kstest

from layerskip.model.choosing.noise import Purpose, gumbel, make_key, uniforms

CPU = torch.device("cpu")


def noise(keys: list[int], vocab_size: int) -> torch.Tensor:
    return gumbel([keys], vocab_size, CPU)[0]


def test_keys_keep_their_values() -> None:
    """Golden values: with others, the same seed would write another text than in an earlier version."""
    assert make_key(0, Purpose.TARGET, 0) == 8760411249752654535
    assert make_key(1234, Purpose.RESIDUAL, 56, 7) == 7762033355720649442
    assert make_key(2**63 - 1, Purpose.ACCEPT, 100_000, 3) == 4652017926999597003


def test_noise_keeps_its_values() -> None:
    expected = torch.tensor([1.1753957, 2.0761061, -0.7586064, 0.1858746, 1.6664948])
    torch.testing.assert_close(noise([make_key(1234, Purpose.TARGET, 56)], 5)[0], expected, rtol=1e-6, atol=1e-6)
    assert uniforms([[make_key(1234, Purpose.ACCEPT, 56, 7)]], CPU).item() == 0.03871270276408678


def test_noise_follows_the_gumbel_distribution() -> None:
    keys = [make_key(seed, Purpose.TARGET, 17) for seed in range(20)]
    values = noise(keys, 10_000)
    assert values.isfinite().all()
    assert kstest(values.flatten().double().numpy(), "gumbel_r").pvalue > 0.01
    assert min(kstest(row.double().numpy(), "gumbel_r").pvalue for row in values) > 0.01 / 20


@pytest.mark.parametrize("vary", ["seed", "position", "counter"])
def test_one_token_over_many_places_follows_the_distribution(vary: str) -> None:
    place = {"seed": 5, "purpose": Purpose.DRAFT, "position": 9, "counter": 2}
    keys = [make_key(**{**place, vary: i}) for i in range(20_000)]
    values = noise(keys, 3).double()
    for token in range(3):
        assert kstest(values[:, token].numpy(), "gumbel_r").pvalue > 0.01
    assert correlation(values[:-1, 0], values[1:, 0]) < 0.03  # neighbours
    assert correlation(values[:, 0], values[:, 1]) < 0.03


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack((x, y)))[0, 1]))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"position": 11},
        {"position": 10 + 2**16},
        {"purpose": Purpose.DRAFT},
        {"purpose": Purpose.RESIDUAL},
        {"counter": 1},
        {"seed": 4, "position": 9},  # parts that are merely added up would be the same here
        {"seed": 2, "purpose": Purpose.DRAFT},
        {"position": 9, "counter": 1},
    ],
    ids=str,
)
def test_noise_of_different_places_is_uncorrelated(other: dict[str, int]) -> None:
    place = {"seed": 3, "purpose": Purpose.TARGET, "position": 10, "counter": 0}
    first, second = noise([make_key(**place), make_key(**{**place, **other})], 20_000).double()
    assert correlation(first, second) < 0.03
    assert correlation(first[1:], second[:-1]) < 0.03
    assert not torch.isin(first[:100].float(), second.float()).sum() > 5


def test_no_two_places_share_a_key() -> None:
    keys = {
        make_key(seed, purpose, position, counter)
        for seed in range(12)
        for purpose in Purpose
        for position in range(25)
        for counter in range(12)
    }
    assert len(keys) == 12 * len(Purpose) * 25 * 12


def test_noise_depends_on_nothing_else() -> None:
    keys = [[make_key(1, Purpose.TARGET, p) for p in range(4)], [make_key(2, Purpose.TARGET, p) for p in range(4)]]
    whole = gumbel(keys, 50, CPU)
    assert whole.shape == (2, 4, 50)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, gumbel(keys, 50, CPU))
    assert torch.equal(whole[1:, 2:3], gumbel([keys[1][2:3]], 50, CPU))  # neither on the batch
    assert torch.equal(whole[..., :20], gumbel(keys, 20, CPU))  # nor on the vocabulary's size


def test_argmax_of_scores_and_noise_follows_the_scores() -> None:
    probs = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.009, 0.001])
    keys = [make_key(seed, Purpose.TARGET, 3) for seed in range(40_000)]
    chosen = (probs.log() + noise(keys, 8)).argmax(-1)
    assert (
        chisquare(torch.bincount(chosen, minlength=8).numpy(), (probs * 40_000).numpy(), sum_check=False).pvalue > 0.01
    )


def test_uniforms_are_uniform() -> None:
    values = uniforms([[make_key(s, Purpose.ACCEPT, p) for p in range(40)] for s in range(500)], CPU)
    assert values.shape == (500, 40)
    assert values.dtype == torch.float64
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 0.01
    assert correlation(values[:, 0], values[:, 1]) < 0.2
    assert correlation(values[:-1].flatten(), values[1:].flatten()) < 0.03


def test_uniforms_and_noise_of_the_same_place_and_another_purpose_are_independent() -> None:
    accept = uniforms([[make_key(seed, Purpose.ACCEPT, 7) for seed in range(20_000)]], CPU)[0]
    draft = noise([make_key(seed, Purpose.DRAFT, 7) for seed in range(20_000)], 2)[:, 0].double()
    assert correlation(accept, draft) < 0.03
