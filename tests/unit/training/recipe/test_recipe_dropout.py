"""Layer dropout in a model: which samples pass a layer, what the layer sees, and what its parameters get."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip.training.config import LayerSkipConfig
from layerskip.training.data.packing import IGNORED
from layerskip.training.recipe import recipe as recipe_module
from layerskip.training.recipe.layer_dropout import draw_kept
from layerskip.training.recipe.recipe import LayerSkipRecipe

DROPPED = LayerSkipConfig(dropout_max=0.5, exit_loss_scale=1.0, exit_weights="equal", curriculum="all")
# [4 samples, 4 layers]: all, some, one and none of the samples go through a layer.
KEPT = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)


@pytest.fixture
def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are dropped as `KEPT` says."""
    monkeypatch.setattr(recipe_module, "draw_kept", lambda rates, *, samples, **_: KEPT[list(samples)])


def batch(rows: int = 4, tokens: int = 11) -> dict[str, Tensor]:
    """Some rows are padded, so that masks differ."""
    ids = torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    mask[-1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def some_rows(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in inputs.items()}


def layers_of(model: Any) -> Any:
    decoder = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        largest = expected[name].abs().max().clamp(min=1)
        assert (ours - expected[name]).abs().max() < tolerance * largest, name


def watch(model: Any) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any], Tensor]]:
    """Input, other arguments and output of each layer, as the model sees them."""
    calls: list[Any] = []
    for layer in layers_of(model):
        layer.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((args[0], args[1:], kwargs, hidden(output))),
            with_kwargs=True,
        )
    return calls


# --- what a layer does -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fixed_draws")
def test_dropped_samples_pass_unchanged_and_kept_ones_as_ever(tiny_model: Any, family: str) -> None:
    model, reference = tiny_model(family), tiny_model(family)
    LayerSkipRecipe(model, DROPPED)
    calls = watch(model)
    model(**batch())
    assert len(calls) == 4  # every layer is entered
    for i, (before, args, kwargs, after) in enumerate(calls):
        kept = KEPT[:, i]
        assert torch.equal(after[~kept], before[~kept])
        whole = hidden(layers_of(reference)[i](before, *args, **kwargs))
        torch.testing.assert_close(after[kept], whole[kept], rtol=1e-5, atol=1e-5)
        if kept.any():
            assert ((after - before)[kept].abs().amax((1, 2)) > 1e-2).all()


@pytest.mark.usefixtures("fixed_draws")
def test_a_layers_modules_see_the_kept_samples_only(tiny_model: Any, family: str) -> None:
    model, rows = tiny_model(family), {}
    LayerSkipRecipe(model, DROPPED)
    for i, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: rows.update({i: args[0].shape[0]}))
    model(**batch())
    assert rows == {0: 4, 1: 3, 2: 1}  # the last layer runs no module at all


@pytest.mark.usefixtures("fixed_draws")
def test_a_layer_that_all_samples_skip_has_zero_gradients(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    LayerSkipRecipe(model, DROPPED)
    loss = model(**batch()).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    for i, layer in enumerate(layers_of(model)):
        assert all((parameter.grad == 0).all() == (i == 3) for parameter in layer.mlp.parameters())


@pytest.mark.usefixtures("fixed_draws")
def test_frozen_layers_can_be_skipped_by_all(tiny_model: Any) -> None:
    model = tiny_model()
    layers_of(model).requires_grad_(False)
    LayerSkipRecipe(model, DROPPED)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


# --- arguments that belong to samples --------------------------------------------------------------------------------


def run_alone(model: Any, inputs: dict[str, Any], row: int, recipe: LayerSkipRecipe) -> Any:
    """Loss of one sample by itself, with the draws that it has in the batch; gradients add up."""
    recipe.begin_step(0, 1, rank=row, world_size=len(inputs["labels"]))
    loss = model(**some_rows(inputs, slice(row, row + 1)), num_items_in_batch=20).loss
    loss.backward()
    return loss.item()


def compare_with_each_alone(tiny_model: Any, family: str, inputs: dict[str, Any]) -> Any:
    model, single = tiny_model(family), tiny_model(family)
    LayerSkipRecipe(model, DROPPED)
    recipe = LayerSkipRecipe(single, DROPPED)
    loss = model(**inputs, num_items_in_batch=20).loss
    loss.backward()
    assert loss.item() == pytest.approx(sum(run_alone(single, inputs, row, recipe) for row in range(4)), rel=1e-5)
    assert_same(gradients(model), gradients(single), 3e-5 if family == "gpt_neo" else 1e-5)
    return loss.item()


@pytest.mark.usefixtures("fixed_draws")
def test_padded_samples_are_treated_as_each_alone(tiny_model: Any, family: str) -> None:
    compare_with_each_alone(tiny_model, family, batch())


@pytest.mark.usefixtures("fixed_draws")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_packed_samples_are_treated_as_each_alone(tiny_model: Any, family: str) -> None:
    """Texts within a row, cut elsewhere in each row: positions start anew, and attention ends there."""
    inputs = batch()
    del inputs["attention_mask"]
    positions = [[*range(cut), *range(11 - cut)] for cut in (3, 5, 11, 8)]
    loss = compare_with_each_alone(tiny_model, family, {**inputs, "position_ids": torch.tensor(positions)})
    assert loss != pytest.approx(compare_with_each_alone(tiny_model, family, inputs), rel=1e-3)


@pytest.mark.parametrize("kept", [[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], ids=str)
def test_a_batch_of_one(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, kept: list[int]) -> None:
    monkeypatch.setattr(recipe_module, "draw_kept", lambda *_, **__: torch.tensor([kept], dtype=torch.bool))
    model, reference = tiny_model(), tiny_model()
    recipe = LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.5, exit_loss_scale=0.0))
    for i in (3, 2, 1):
        if not kept[i]:
            del reference.model.layers[i]
    inputs = {**some_rows(batch(), slice(0, 1)), "use_cache": False}
    reference.config.num_hidden_layers = len(reference.model.layers)
    loss = model(**inputs).loss
    assert loss.item() == pytest.approx(reference(**inputs).loss.item(), rel=1e-6)
    loss.backward()
    assert recipe.weights == {3: 1.0}


# --- draws of a run --------------------------------------------------------------------------------------------------


def dropped_by(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, L]: samples that a layer left as they were."""
    calls = watch(model)
    model(**inputs)
    return torch.stack([(after == before).all(-1).all(-1) for before, _, _, after in calls[-4:]], 1)


def test_draws_are_those_of_step_seed_and_place_in_the_global_batch(tiny_model: Any) -> None:
    config = LayerSkipConfig(dropout_max=0.9, dropout_schedule="exponential")
    seen = []
    for step, rank in ((7, 0), (7, 1), (9, 1)):
        model = tiny_model()
        recipe = LayerSkipRecipe(model, config, seed=4)
        recipe.begin_step(step, 10, rank=rank, world_size=2)
        assert recipe.rates[3] == pytest.approx(0.9 * (2 ** (step / 9) - 1))
        for accumulated in range(2):
            first = 8 * accumulated + 4 * rank
            kept = draw_kept(recipe.rates, seed=4, step=step, samples=range(first, first + 4))
            assert torch.equal(dropped_by(model, batch()), ~kept)
            seen.append(kept)
    assert len({str(kept.tolist()) for kept in seen}) == 6


def test_two_processes_together_do_what_one_does(tiny_model: Any) -> None:
    """With gradient accumulation: each of two steps' parts is a batch of the global batch."""
    config = LayerSkipConfig(dropout_max=0.9, exit_loss_scale=1.0, rotation=2)
    inputs = batch(8)
    alone, spread = tiny_model(), tiny_model()
    recipe = LayerSkipRecipe(alone, config, seed=6)
    recipe.begin_step(3, 10)
    expected = sum(alone(**some_rows(inputs, slice(i, i + 4)), num_items_in_batch=60).loss for i in (0, 4))
    expected.backward()
    recipe = LayerSkipRecipe(spread, config, seed=6)
    total = 0.0
    for rank in range(2):
        recipe.begin_step(3, 10, rank=rank, world_size=2)
        for accumulated in range(2):
            start = 4 * accumulated + 2 * rank
            loss = spread(**some_rows(inputs, slice(start, start + 2)), num_items_in_batch=60).loss
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(spread), gradients(alone))


@pytest.mark.usefixtures("fixed_draws")
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(tiny_model: Any, family: str) -> None:
    model, plain, inputs = tiny_model(family), tiny_model(family), batch()
    LayerSkipRecipe(plain, DROPPED)
    recipe = LayerSkipRecipe(model, DROPPED)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    rows: list[list[int]] = [[], [], [], []]
    for i, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: rows[i].append(args[0].shape[0]))
    losses = [m(**inputs).loss for m in (model, plain)]
    assert rows == [[4], [3], [1], []]
    for loss in losses:
        loss.backward()
    assert rows == [[4, 4], [3, 3], [1, 1], []]  # computed twice indeed, of the same samples
    assert recipe._forward is not None
    assert not recipe._forward.states  # recomputation keeps no hidden states alive
    assert losses[0].item() == losses[1].item()
    assert_same(gradients(model), gradients(plain), 1e-6)


def test_a_second_pass_before_the_backward_pass_of_the_first(tiny_model: Any) -> None:
    """Without checkpointing, passes don't depend on one another."""
    model, inputs = tiny_model(), batch()
    recipe = LayerSkipRecipe(model, DROPPED, seed=2)
    first = model(**inputs).loss
    model(**inputs)
    first.backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    recipe.begin_step(0, 1)
    again = model(**inputs).loss
    again.backward()
    assert again.item() == first.item()
    assert_same(found, gradients(model), 1e-6)
