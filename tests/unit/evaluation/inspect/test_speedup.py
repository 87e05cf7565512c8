"""The ideal speedup, against values worked out by hand and against a plain sum over rounds."""

import pytest

from layerskip.evaluation.inspect.speedup import MAX_DRAFTS, ideal_speedup


def speedup(acceptance: float, exit_layer: int = 4, num_layers: int = 16, head_cost: float = 0.0) -> float:
    return ideal_speedup(acceptance, exit_layer=exit_layer, num_layers=num_layers, head_cost=head_cost).speedup


def test_without_acceptance_one_draft_is_wasted() -> None:
    found = ideal_speedup(0.0, exit_layer=4, num_layers=16)
    assert (found.exit_layer, found.num_speculations) == (4, 1)
    assert found.speedup == pytest.approx(16 / (4 + 16))


def test_half_of_the_drafts_accepted() -> None:
    """1.5 tokens for 20 layers; two drafts: 1.75 for 24; three: 1.875 for 28."""
    found = ideal_speedup(0.5, exit_layer=4, num_layers=16)
    assert found.num_speculations == 1
    assert found.speedup == pytest.approx(1.5 * 16 / 20)
    cheaper = ideal_speedup(0.5, exit_layer=1, num_layers=16)
    # K = 3: 1.875 / 19; K = 4: 1.9375 / 20; K = 2: 1.75 / 18
    assert cheaper.num_speculations == 3
    assert cheaper.speedup == pytest.approx(1.875 * 16 / 19)


def test_the_head_is_read_for_each_draft_and_once_to_verify() -> None:
    found = ideal_speedup(0.5, exit_layer=4, num_layers=16, head_cost=2.0)
    assert found.num_speculations == 1
    assert found.speedup == pytest.approx(1.5 * 18 / (6 + 18))


def test_with_all_accepted_as_many_drafts_as_allowed_pay() -> None:
    found = ideal_speedup(1.0, exit_layer=4, num_layers=16)
    assert found.num_speculations == MAX_DRAFTS
    assert found.speedup == pytest.approx((MAX_DRAFTS + 1) * 16 / (4 * MAX_DRAFTS + 16))


def test_drafting_with_all_layers_gains_nothing() -> None:
    assert speedup(1.0, exit_layer=16) == pytest.approx(1.0)
    assert speedup(0.9, exit_layer=16) < 1.0


@pytest.mark.parametrize("head_cost", [0.0, 0.7, 20.0])
@pytest.mark.parametrize("exit_layer", [1, 4, 15])
def test_more_acceptance_is_never_worse(exit_layer: int, head_cost: float) -> None:
    found = [ideal_speedup(a / 20, exit_layer=exit_layer, num_layers=16, head_cost=head_cost) for a in range(21)]
    speedups, drafts = [f.speedup for f in found], [f.num_speculations for f in found]
    assert speedups == sorted(speedups)
    assert len(set(speedups)) == 21
    assert drafts == sorted(drafts)


def test_earlier_exits_and_cheaper_heads_are_better_at_the_same_acceptance() -> None:
    by_exit = [speedup(0.8, exit_layer) for exit_layer in range(1, 17)]
    assert by_exit == sorted(by_exit, reverse=True)
    by_head = [speedup(0.8, head_cost=cost) for cost in (0.0, 0.5, 2.0, 50.0)]
    assert by_head == sorted(by_head, reverse=True)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("exit_layer", [1, 3, 8, 15])
def test_never_better_than_its_tokens_nor_than_free_verification(exit_layer: int, acceptance: float) -> None:
    for head_cost in (0.0, 1.5):
        found = ideal_speedup(acceptance, exit_layer=exit_layer, num_layers=16, head_cost=head_cost)
        tokens = sum(acceptance**i for i in range(found.num_speculations + 1))
        assert 0 < found.speedup < tokens <= found.num_speculations + 1
        assert found.speedup < (16 + head_cost) / (exit_layer + head_cost) or acceptance == 0


def test_no_other_number_of_drafts_is_better() -> None:
    for acceptance in (0.2, 0.6, 0.9):
        found = ideal_speedup(acceptance, exit_layer=3, num_layers=12, head_cost=1.0)
        grid = {
            drafts: (1 - acceptance ** (drafts + 1)) / (1 - acceptance) * 13 / (drafts * 4 + 13)
            for drafts in range(1, MAX_DRAFTS + 1)
        }
        assert found.speedup == pytest.approx(max(grid.values()))
        assert grid[found.num_speculations] == pytest.approx(found.speedup)
