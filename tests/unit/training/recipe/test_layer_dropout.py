"""Layer dropout: rates worked out by hand, and draws that have those rates and depend on nothing else."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from layerskip.training.recipe.layer_dropout import depth_scale, draw_kept, dropout_rates, time_scale

UNLIKELY = 1e-4


def draw(rates: list[float], *, seed: int = 0, step: int = 0, first: int = 0, count: int = 4000) -> Tensor:
    return draw_kept(rates, seed=seed, step=step, samples=range(first, first + count))


def assert_share(hits: Tensor, expected: float) -> None:
    """The share of true values is the expected one, as far as chance allows."""
    assert binomtest(int(hits.sum()), hits.numel(), expected).pvalue > UNLIKELY


def test_depth_scale_of_four_layers() -> None:
    found = [depth_scale(layer, 4) for layer in range(4)]
    assert found == pytest.approx([0.0, 0.2599210499, 0.5874010520, 1.0], abs=1e-9)  # 2^(l/3) - 1


@pytest.mark.parametrize(
    ("layer", "scale"),
    [(0, 0.0), (1, 0.0226114356), (8, 0.1958732740), (16, 0.4301128876), (30, 0.9557770727), (31, 1.0)],
)
def test_depth_scale_of_32_layers(layer: int, scale: float) -> None:
    assert depth_scale(layer, 32) == pytest.approx(scale, abs=1e-9)  # 2^(l/31) - 1


def test_time_scale() -> None:
    growing = [time_scale(step, 5, "exponential") for step in range(5)]
    assert growing == pytest.approx([0.0, 0.1892071150, 0.4142135624, 0.6817928305, 1.0], abs=1e-9)  # 2^(t/4) - 1
    assert [time_scale(step, 5, "constant") for step in range(5)] == [1.0] * 5


def test_rates_are_the_product_of_both_scales_and_the_highest_rate() -> None:
    def rates(step: int, schedule: str) -> list[float]:
        return dropout_rates(step, num_steps=5, num_layers=4, dropout_max=0.2, schedule=schedule)  # type: ignore[arg-type]

    assert rates(2, "constant") == pytest.approx([0.0, 0.0519842100, 0.1174802104, 0.2], abs=1e-9)
    assert rates(2, "exponential") == pytest.approx([0.0, 0.0215325648, 0.0486618965, 0.0828427125], abs=1e-9)
    assert rates(0, "exponential") == [0.0] * 4
    assert rates(4, "exponential") == pytest.approx(rates(0, "constant"))


def test_a_model_of_one_layer_and_a_run_of_one_step() -> None:
    assert depth_scale(0, 1) == 0.0  # the first layer, which is never skipped
    assert time_scale(0, 1, "exponential") == 0.0
    assert time_scale(0, 1, "constant") == 1.0
    one_layer = dropout_rates(0, num_steps=3, num_layers=1, dropout_max=0.5, schedule="constant")
    one_step = dropout_rates(0, num_steps=1, num_layers=4, dropout_max=0.5, schedule="constant")
    assert one_layer == [0.0]
    assert one_step == pytest.approx([0.0, 0.1299605249, 0.2937005260, 0.5])


def test_samples_are_dropped_at_the_scheduled_rates() -> None:
    rates = dropout_rates(600, num_steps=1000, num_layers=8, dropout_max=0.5, schedule="exponential")
    dropped = ~torch.cat([draw(rates, step=step, count=2000) for step in range(3)])
    assert dropped.shape == (6000, 8)
    assert dropped.dtype == torch.bool
    for layer in range(1, 8):
        assert rates[layer] > 0.02
        assert_share(dropped[:, layer], rates[layer])


def test_the_first_layer_is_never_dropped_and_a_rate_of_one_always_drops() -> None:
    rates = dropout_rates(0, num_steps=1, num_layers=4, dropout_max=0.999, schedule="constant")
    assert draw(rates, count=5000)[:, 0].all()
    assert not draw([0.0, 1.0], count=5000)[:, 1].any()


def test_draws_of_layers_samples_steps_and_seeds_are_independent() -> None:
    rates = [0.5] * 4
    reference = draw(rates)
    for layer in range(3):
        assert_share(reference[:, layer] == reference[:, layer + 1], 0.5)
    assert_share(reference[1:] == reference[:-1], 0.5)  # neighbouring samples
    assert_share(reference == draw(rates, step=1), 0.5)
    assert_share(reference == draw(rates, seed=1), 0.5)
    assert_share(reference[1:] == draw(rates, step=1)[:-1], 0.5)  # one step on isn't one sample on


def test_each_rank_draws_its_part_of_the_global_batch() -> None:
    rates = [0.0, 0.3, 0.6]
    whole = draw(rates, seed=3, step=7, count=24)
    for world_size in (1, 2, 3, 8):
        size = 24 // world_size
        parts = [draw(rates, seed=3, step=7, first=rank * size, count=size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)


def test_draws_are_reproducible_whatever_torch_has_drawn_before() -> None:
    before = draw([0.0, 0.5, 0.9], seed=2, step=5, count=50)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(draw([0.0, 0.5, 0.9], seed=2, step=5, count=50), before)
    assert torch.equal(torch.random.get_rng_state(), state)  # and leave torch's own generator alone


def test_a_higher_rate_drops_more_of_the_same_samples() -> None:
    """Draws are thresholds: what a low rate drops, a higher one drops too."""
    low, high = draw([0.2, 0.2]), draw([0.4, 0.4])
    assert (low | ~high).all()
    assert not torch.equal(low, high)
