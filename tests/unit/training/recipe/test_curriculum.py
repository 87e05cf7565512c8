"""Exits that have a loss at a step, and their weights, against tables worked out by hand."""

from collections import Counter
from typing import Any

import pytest

from layerskip.training.config import LayerSkipConfig
from layerskip.training.recipe.curriculum import enabled_exits, exit_scale, exit_weights


def enabled(step: int, num_layers: int = 4, **options: Any) -> list[int]:
    settings = {"num_steps": 16, "curriculum": "rotational", "rotation": 2, **options}
    return enabled_exits(step, exits=range(num_layers), **settings)


def test_rotation_of_four_layers_by_two() -> None:
    assert [enabled(step) for step in range(4)] == [[0, 2, 3], [1, 3], [0, 2, 3], [1, 3]]


def test_rotation_of_32_layers_by_eight_visits_every_exit_once() -> None:
    steps = [enabled(step, 32, rotation=8) for step in range(8)]
    assert steps[0] == [0, 8, 16, 24, 31]
    assert steps[1] == [1, 9, 17, 25, 31]
    assert steps[7] == [7, 15, 23, 31]
    counts = Counter(exit_ for exits in steps for exit_ in exits)
    assert counts == {**dict.fromkeys(range(31), 1), 31: 8}
    assert [enabled(step, 32, rotation=8) for step in range(8, 16)] == steps


def test_rotation_by_one_is_all_and_by_the_depth_is_one_at_a_time() -> None:
    assert enabled(5, rotation=1) == [0, 1, 2, 3]
    assert [enabled(step, rotation=4) for step in range(4)] == [[0, 3], [1, 3], [2, 3], [3]]


def test_gradual_enables_one_more_exit_every_two_of_sixteen_steps() -> None:
    found = [enabled(step, curriculum="gradual") for step in range(16)]
    assert found == [[3]] * 2 + [[2, 3]] * 2 + [[1, 2, 3]] * 2 + [[0, 1, 2, 3]] * 10


def test_gradual_where_steps_are_fewer_than_exits_or_no_multiple() -> None:
    assert [enabled(step, num_steps=2, curriculum="gradual") for step in range(2)] == [[3], [0, 1, 2, 3]]
    assert enabled(0, num_steps=1, curriculum="gradual") == [3]
    # T / (2L) = 10 / 8: changes at 1.25, 2.5 and 3.75
    sizes = [len(enabled(step, num_steps=10, curriculum="gradual")) for step in range(10)]
    assert sizes == [1, 1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_all_exits_all_the_time() -> None:
    assert all(enabled(step, curriculum="all") == [0, 1, 2, 3] for step in range(16))


def test_curricula_go_through_the_named_exits() -> None:
    exits = LayerSkipConfig(exit_layers=(8, 4, 2)).exits_for(16)
    assert exits == [1, 3, 7, 15]

    def found(step: int, curriculum: str) -> list[int]:
        return enabled_exits(step, num_steps=16, exits=exits, curriculum=curriculum, rotation=2)  # type: ignore[arg-type]

    assert [found(step, "rotational") for step in range(3)] == [[1, 7, 15], [3, 15], [1, 7, 15]]
    assert [found(step, "gradual") for step in (0, 2, 4, 6)] == [[15], [7, 15], [3, 7, 15], exits]
    assert found(0, "all") == exits


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
@pytest.mark.parametrize(("num_layers", "rotation"), [(1, 1), (4, 3), (7, 5), (32, 8)])
def test_the_last_exit_is_always_enabled(curriculum: str, num_layers: int, rotation: int) -> None:
    for step in range(12):
        found = enabled(step, num_layers, num_steps=12, curriculum=curriculum, rotation=rotation)
        assert found[-1] == num_layers - 1
        assert found == sorted(set(found))
        assert found[0] >= 0


@pytest.mark.parametrize(("scale", "expected"), [(0.2, [0.0, 0.2, 0.6, 3.6]), (1.0, [0.0, 1.0, 3.0, 6.0])])
def test_scales_of_four_exits(scale: float, expected: list[float]) -> None:
    assert [exit_scale(exit_, 4, scale) for exit_ in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(("exit_", "expected"), [(0, 0.0), (1, 0.2), (8, 7.2), (16, 27.2), (30, 93.0), (31, 124.0)])
def test_scales_of_32_exits(exit_: int, expected: float) -> None:
    assert exit_scale(exit_, 32, 0.2) == pytest.approx(expected)


def test_scales_follow_the_papers_sums() -> None:
    for num_layers in (2, 3, 5, 24):
        last = num_layers - 1
        for exit_ in range(last):
            assert exit_scale(exit_, num_layers, 0.3) == pytest.approx(0.3 * sum(range(exit_ + 1)))
        assert exit_scale(last, num_layers, 0.3) == pytest.approx(last + 0.3 * sum(range(last)))


def test_weights_of_four_exits() -> None:
    assert exit_weights([0, 1, 2, 3], 4, 0.2) == pytest.approx({1: 0.2 / 4.4, 2: 0.6 / 4.4, 3: 3.6 / 4.4})
    assert exit_weights([0, 1, 2, 3], 4, 1.0) == pytest.approx({1: 0.1, 2: 0.3, 3: 0.6})
    assert exit_weights([1, 3], 4, 1.0) == pytest.approx({1: 1 / 7, 3: 6 / 7})
    assert exit_weights([3], 4, 1.0) == {3: 1.0}


def test_weights_of_a_rotation_step_of_32_exits() -> None:
    found = exit_weights([0, 8, 16, 24, 31], 32, 0.2)  # 7.2, 27.2, 60, 124 of 218.4; the first exit has none
    assert found == pytest.approx({8: 0.0329670330, 16: 0.1245421245, 24: 0.2747252747, 31: 0.5677655678}, abs=1e-9)


def test_equal_weights() -> None:
    assert exit_weights([0, 1, 3], 4, 0.5, "equal") == pytest.approx({0: 0.25, 1: 0.25, 3: 0.5})
    assert exit_weights([0, 1, 2, 3], 4, 0.2, "equal") == pytest.approx({0: 0.125, 1: 0.125, 2: 0.125, 3: 0.625})


@pytest.mark.parametrize("kind", ["depth", "equal"])
@pytest.mark.parametrize("scale", [0.1, 0.2, 1.0, 7.0])
def test_weights_sum_to_one_and_leave_no_exit_without_weight(kind: Any, scale: float) -> None:
    for num_layers in (1, 2, 4, 32):
        for step in range(8):
            weights = exit_weights(enabled(step, num_layers, rotation=min(8, num_layers)), num_layers, scale, kind)
            assert sum(weights.values()) == pytest.approx(1.0)
            assert min(weights.values()) > 0
            assert max(weights) == num_layers - 1


@pytest.mark.parametrize("kind", ["depth", "equal"])
def test_a_scale_of_zero_leaves_only_the_last_exit(kind: Any) -> None:
    assert exit_weights(range(4), 4, 0.0, kind) == {3: 1.0}


@pytest.mark.parametrize("kind", ["depth", "equal"])
@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_a_model_of_one_layer_has_its_last_exit_only(kind: Any, scale: float) -> None:
    assert exit_weights(enabled(0, 1, rotation=1), 1, scale, kind) == {0: 1.0}
