"""Settings of a run: what is refused, what is filled in, and which differences matter to a run that resumes."""

from dataclasses import replace
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.config import (
    CheckpointConfig,
    LayerSkipConfig,
    OptimizationConfig,
    StartConfig,
    TrainingConfig,
)
from layerskip.training.data.config import DataConfig
from layerskip.training.output.output_folder import changed_settings
from layerskip.training.run import resolve

NAN, INFINITY = float("nan"), float("inf")


def refusal(kind: type, **settings: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        kind(**settings)
    return str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, NAN, INFINITY])
@pytest.mark.parametrize(("kind", "name"), [(LayerSkipConfig, "dropout_max"), (OptimizationConfig, "adam_beta2")])
def test_shares_below_one(kind: type, name: str, value: float) -> None:
    assert refusal(kind, **{name: value}) == f"{name} must be at least 0 and below 1, got {value}"


@pytest.mark.parametrize(
    ("kind", "name", "least"),
    [
        (LayerSkipConfig, "exit_loss_scale", 0),
        (LayerSkipConfig, "rotation", 1),
        (StartConfig, "lora_alpha", 1),
        (OptimizationConfig, "max_steps", 1),
        (OptimizationConfig, "batch_size", 1),
        (OptimizationConfig, "gradient_accumulation", 1),
        (OptimizationConfig, "warmup_steps", 0),
        (OptimizationConfig, "weight_decay", 0),
        (OptimizationConfig, "max_grad_norm", 0),
        (OptimizationConfig, "min_learning_rate", 0),
        (OptimizationConfig, "seed", 0),
        (CheckpointConfig, "save_steps", 1),
        (CheckpointConfig, "keep", 1),
        (CheckpointConfig, "eval_steps", 1),
        (CheckpointConfig, "log_steps", 1),
    ],
)
def test_least_values(kind: type, name: str, least: int) -> None:
    assert getattr(kind(**{name: least}), name) == least
    for value in (least - 1, NAN, INFINITY, -INFINITY):
        assert refusal(kind, **{name: value}) == f"{name} must be a number from {least} on, got {value}"


@pytest.mark.parametrize("value", [0.0, -1e-4, NAN, INFINITY])
def test_learning_rates(value: float) -> None:
    assert refusal(OptimizationConfig, learning_rate=value) == f"learning_rate must be above 0, got {value}"


@pytest.mark.parametrize("rank", [0, -1])
def test_lora_rank(rank: int) -> None:
    assert f"lora_rank must be a number from 1 on, got {rank}" in refusal(StartConfig, model="demo", lora_rank=rank)


@pytest.mark.parametrize("other", [{"config": "small"}, {"tokenizer": "demo"}, {"vocab_size": 300}])
def test_a_trained_model_has_shape_and_tokenizer(other: dict[str, Any]) -> None:
    assert "leave them out, or leave out model" in refusal(StartConfig, model="demo", **other)


def test_adapters_need_a_trained_model() -> None:
    assert "give it with model" in refusal(StartConfig, lora_rank=4)
    assert "with config all weights are trained" in refusal(StartConfig, config="small", lora_rank=4)


def test_a_tokenizer_has_its_size() -> None:
    message = refusal(StartConfig, config="small", tokenizer="demo", vocab_size=300)
    assert "give it or a tokenizer, not both" in message


def test_from_scratch() -> None:
    assert StartConfig(config="small").from_scratch
    assert not StartConfig(model="demo").from_scratch


def test_rotation_for_a_number_of_layers() -> None:
    assert LayerSkipConfig().rotation_for(32) == 8
    assert LayerSkipConfig().rotation_for(3) == 3
    assert LayerSkipConfig(rotation=3).rotation_for(3) == 3
    with pytest.raises(InvalidArgumentError) as caught:
        LayerSkipConfig(rotation=4).rotation_for(3)
    assert str(caught.value) == "rotation is 4, but the model has 3 layers; it must be from 1 to 3"


@pytest.mark.parametrize("exit_layers", [(0,), (4, -1), (2, 2)])
def test_exits_that_make_no_sense(exit_layers: tuple[int, ...]) -> None:
    message = refusal(LayerSkipConfig, exit_layers=exit_layers)
    assert message == f"exit_layers must be different numbers from 1 on, got {exit_layers}"


def test_exits_of_a_number_of_layers() -> None:
    assert LayerSkipConfig().exits_for(4) == [0, 1, 2, 3]
    assert LayerSkipConfig(exit_layers=(2,)).exits_for(4) == [1, 3]
    assert LayerSkipConfig(exit_layers=(4, 1)).exits_for(4) == [0, 3]
    assert LayerSkipConfig(exit_layers=(2,)).rotation_for(4) == 2


@pytest.mark.parametrize(
    ("start", "schedule", "rate"),
    [
        (StartConfig(config="small"), "exponential", 8e-4),
        (StartConfig(model="demo"), "constant", 3e-5),
        (StartConfig(model="demo", lora_rank=4), "constant", 1e-4),
    ],
)
def test_defaults_that_depend_on_the_start(start: StartConfig, schedule: str, rate: float) -> None:
    resolved = resolve(TrainingConfig(start=start))
    assert (resolved.recipe.dropout_schedule, resolved.optimization.learning_rate) == (schedule, rate)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (19, 0), (20, 1), (1000, 50), (40_000, 2000), (10**6, 2000)])
def test_default_warmup(steps: int, warmup: int) -> None:
    config = TrainingConfig(optimization=OptimizationConfig(max_steps=steps))
    assert resolve(config).optimization.warmup_steps == warmup


def test_what_is_given_stays() -> None:
    config = TrainingConfig(
        start=StartConfig(config="small"),
        recipe=LayerSkipConfig(dropout_schedule="constant"),
        optimization=OptimizationConfig(learning_rate=1e-3, warmup_steps=0),
    )
    assert resolve(config) == config
    assert resolve(resolve(TrainingConfig())) == resolve(TrainingConfig())


def test_differences_are_named_with_both_values() -> None:
    before = TrainingConfig(data=DataConfig(data=("a",)))
    now = replace(
        before,
        data=DataConfig(data=("a", "b")),
        recipe=LayerSkipConfig(dropout_max=0.2),
        optimization=OptimizationConfig(seed=1),
    )
    assert changed_settings(before, before) == []
    assert changed_settings(before, now) == [
        "data ('a',), not ('a', 'b')",
        "dropout_max 0.1, not 0.2",
        "seed 0, not 1",
    ]


def test_how_often_things_are_saved_makes_no_difference() -> None:
    now = TrainingConfig(checkpoints=CheckpointConfig(save_steps=7, keep=9, eval_steps=3, report_to=("wandb",)))
    assert changed_settings(TrainingConfig(), now) == []
