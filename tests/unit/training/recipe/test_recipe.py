"""The recipe on transformers' models: its loss and gradients, evaluation, and what it leaves behind."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerskip
from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.evaluation.inspect.exits import measure_exits
from layerskip.training.config import LayerSkipConfig
from layerskip.training.data.packing import IGNORED
from layerskip.training.recipe import exit_loss as exit_loss_module
from layerskip.training.recipe import recipe as recipe_module
from layerskip.training.recipe.recipe import LayerSkipRecipe

PLAIN = LayerSkipConfig(dropout_max=0.0, exit_loss_scale=0.0)
JOINT = LayerSkipConfig(dropout_max=0.0, exit_loss_scale=1.0, curriculum="all")


def batch(rows: int = 3, tokens: int = 11, *, ignored: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored:
        labels[0, :4] = labels[-1, 6:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def norm_of(model: Any) -> nn.Module:
    decoder = model.get_decoder()
    return decoder.norm if hasattr(decoder, "norm") else decoder.ln_f


def naive_losses(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[float]]:
    """Summed cross-entropy of every exit, and its agreement with the last layer, from all hidden states."""
    output = model(input_ids=inputs["input_ids"], output_hidden_states=True)
    labels = inputs["labels"][:, 1:].flatten()
    scale = getattr(model.config, "logits_scaling", 1.0)
    logits = [
        model.lm_head(norm_of(model)(state)) / scale for state in output.hidden_states[1:-1]
    ]  # the last is normed
    flat = [x[:, :-1].flatten(0, 1) for x in (*logits, output.logits)]
    losses = [F.cross_entropy(x, labels, ignore_index=IGNORED, reduction="sum") for x in flat]
    agrees = [(x.argmax(-1) == flat[-1].argmax(-1))[labels != IGNORED].float().mean().item() for x in flat]
    return losses, agrees


def assert_same_gradients(model: Any, reference: Any, tolerance: float) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        largest = theirs.grad.abs().max().clamp(min=1)
        assert (ours.grad - theirs.grad).abs().max() < tolerance * largest, name


@pytest.mark.parametrize("num_items", [None, 7, 50])
def test_without_dropout_and_exits_loss_and_gradients_are_those_of_transformers(
    tiny_model: Any, family: str, num_items: int | None
) -> None:
    model, reference = tiny_model(family), tiny_model(family)
    inputs: dict[str, Any] = (
        batch() if num_items is None else {**batch(), "num_items_in_batch": torch.tensor(num_items)}
    )
    LayerSkipRecipe(model, PLAIN)
    ours, theirs = model(**inputs).loss, reference(**inputs).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    # GPT-Neo doesn't scale its attention scores, so rounding counts for more
    assert_same_gradients(model, reference, 5e-5 if family == "gpt_neo" else 2e-6)


def test_joint_loss_and_gradients_equal_those_of_all_hidden_states(
    tiny_model: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_module, "CHUNK_LOGITS_CPU", 1)  # chunks of 64 tokens, of 100
    model, reference, inputs = tiny_model(family), tiny_model(family), batch(4, 25)
    recipe = LayerSkipRecipe(model, JOINT)
    assert recipe.weights == pytest.approx({1: 0.1, 2: 0.3, 3: 0.6})
    losses, _ = naive_losses(reference, inputs)
    expected = (0.1 * losses[1] + 0.3 * losses[2] + 0.6 * losses[3]) / (inputs["labels"][:, 1:] != IGNORED).sum()
    loss = model(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, reference, 5e-6)


def test_tokens_without_a_label_get_no_logits(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and padding are often most of a batch; heads are a good part of the cost of a large vocabulary."""
    monkeypatch.setattr(exit_loss_module, "ROUND_TO", 1)
    model, inputs, rows = tiny_model(), batch(4, 25), list[int]()
    recipe = LayerSkipRecipe(model, JOINT)
    head = recipe._head.linear.forward

    def count(states: torch.Tensor) -> torch.Tensor:
        rows.append(states.shape[0])
        return head(states)

    monkeypatch.setattr(recipe._head.linear, "forward", count)
    learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
    assert learned < 4 * 25
    model(**inputs).loss.backward()
    assert sum(rows) - 4 == len(recipe.weights) * learned  # the model's own head is called for one position a sample


@pytest.mark.parametrize(
    ("vocab_size", "width", "tokens"), [(2048, 192, 1024), (49_152, 576, 1152), (262_144, 640, 256), (32, 8, 65_536)]
)
def test_chunks_on_a_cpu_are_larger_where_the_heads_gradient_is(vocab_size: int, width: int, tokens: int) -> None:
    assert recipe_module.tokens_of_chunk(vocab_size, width, on_cpu=True) == tokens


def test_exits_follow_the_step(tiny_model: Any) -> None:
    model, inputs = tiny_model(), batch()
    recipe = LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.0, exit_loss_scale=1.0, rotation=2))
    losses = [x.item() for x in naive_losses(tiny_model(), inputs)[0]]
    items = float((inputs["labels"][:, 1:] != IGNORED).sum())
    for step, expected in enumerate([losses[2] / 3 + losses[3] * 2 / 3, losses[1] / 7 + losses[3] * 6 / 7] * 2):
        recipe.begin_step(step, 4)
        assert model(**inputs).loss.item() == pytest.approx(expected / items, rel=1e-5)


def test_only_named_exits_have_a_loss(tiny_model: Any) -> None:
    model, inputs = tiny_model(), batch()
    config = LayerSkipConfig(
        dropout_max=0.0, exit_loss_scale=0.5, exit_layers=(2,), exit_weights="equal", curriculum="all"
    )
    LayerSkipRecipe(model, config)
    losses = [x.item() for x in naive_losses(tiny_model(), inputs)[0]]
    items = float((inputs["labels"][:, 1:] != IGNORED).sum())
    expected = (0.5 * losses[1] + losses[3]) / 1.5
    assert model(**inputs).loss.item() == pytest.approx(expected / items, rel=1e-5)


def test_labels_that_are_shifted_already(tiny_model: Any) -> None:
    model, reference, inputs = tiny_model(), tiny_model(), batch()
    LayerSkipRecipe(model, PLAIN)
    shifted = inputs["labels"].roll(-1, 1)  # the last token has a label too
    ours, theirs = model(**inputs, shift_labels=shifted).loss, reference(**inputs, shift_labels=shifted).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ours.item() != pytest.approx(model(**inputs).loss.item(), rel=1e-4)


def test_a_tuple_is_returned_where_it_is_asked_for(tiny_model: Any) -> None:
    model, inputs = tiny_model(), batch()
    LayerSkipRecipe(model, JOINT)
    loss = model(**inputs, return_dict=False)[0]
    assert loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)


# --- evaluation mode, detaching, copies ------------------------------------------------------------------------------


def test_a_model_in_evaluation_mode_stays_as_it_is(tiny_model: Any, family: str) -> None:
    model, reference, inputs = tiny_model(family), tiny_model(family).eval(), batch()
    LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.99, exit_loss_scale=1.0))
    model(**inputs).loss.backward()  # leaves nothing behind that the next passes see
    model.eval()
    ours, theirs = model(**inputs), reference(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    prompt = inputs["input_ids"][:, :4]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), reference.generate(prompt, **options))


def test_a_decoder_that_is_called_alone_after_a_training_pass_drops_nothing(tiny_model: Any) -> None:
    model, reference, inputs = tiny_model(), tiny_model().eval(), batch()
    LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.99))
    model(**inputs).loss.backward()
    ids = inputs["input_ids"]
    ours = model.eval().get_decoder()(ids).last_hidden_state
    assert torch.equal(ours, reference.get_decoder()(ids).last_hidden_state)


def test_detaching_restores_the_model(tiny_model: Any, family: str) -> None:
    model, reference, inputs = tiny_model(family), tiny_model(family), batch()
    names = [set(vars(module)) for module in model.modules()]
    recipe = LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.9, exit_loss_scale=1.0))
    model(**inputs).loss.backward()
    recipe.detach()
    assert [set(vars(module)) for module in model.modules()] == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    ours, theirs = model(**inputs), reference(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_the_forward_that_another_library_gave_a_layer_is_used_and_restored(tiny_model: Any) -> None:
    model, calls = tiny_model(), []
    layer = model.model.layers[2]
    original = layer.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = other
    recipe = LayerSkipRecipe(model, JOINT)
    calls.clear()
    model(**batch())
    assert calls == [1]
    recipe.detach()
    assert layer.forward is other


def test_a_copy_of_an_attached_model_is_independent(tiny_model: Any) -> None:
    model, inputs = tiny_model(), batch()
    recipe = LayerSkipRecipe(model, JOINT)
    model(**inputs).loss.backward()
    clone = copy.deepcopy(model)
    clone_recipe = clone.model.layers[0].layerskip[0]
    assert clone_recipe is not recipe
    assert clone_recipe.model is clone
    expected = model(**inputs).loss.item()
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    clone.zero_grad()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    changed = clone(**inputs).loss
    assert changed.item() != pytest.approx(expected, rel=1e-3)  # it's the copy's weights that count
    changed.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    clone_recipe.detach()
    assert not hasattr(clone.model.layers[0], "layerskip")
    assert model(**inputs).loss.item() == expected


def test_parameters_keep_their_names(tiny_model: Any) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    LayerSkipRecipe(model, JOINT)
    assert list(model.state_dict()) == names


# --- measuring exits -------------------------------------------------------------------------------------------------


def test_measured_exits_equal_a_naive_computation(
    tiny_model: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_module, "CHUNK_LOGITS_CPU", 1)
    model, inputs = tiny_model(family), batch(4, 25)
    recipe = LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.9))
    model.eval()
    with recipe.measure() as statistics:
        model(**inputs)
        model(input_ids=inputs["input_ids"])  # without labels: doesn't count
    model(**inputs)  # nor does this
    with torch.no_grad():
        losses, agrees = naive_losses(tiny_model(family).eval(), inputs)
    found = statistics.qualities()
    assert statistics.num_tokens == int((inputs["labels"][:, 1:] != IGNORED).sum())
    assert [q.exit_layer for q in found] == [1, 2, 3, 4]
    assert [q.loss for q in found] == pytest.approx([x.item() / statistics.num_tokens for x in losses], rel=1e-5)
    assert [q.agreement for q in found] == pytest.approx(agrees)


def test_measured_exits_equal_those_of_the_inference_engine(tiny_model: Any, tmp_path: Any) -> None:
    model, inputs = tiny_model(), batch(4, 20, ignored=False)
    recipe = LayerSkipRecipe(model, LayerSkipConfig())
    model.eval().save_pretrained(tmp_path)
    with recipe.measure() as statistics:
        for start in (0, 3):  # two batches add up
            model(**{name: value[start : start + 3] for name, value in inputs.items()})
    lm = layerskip.load(str(tmp_path), dtype="float32", device="cpu")
    report = measure_exits(lm, inputs["input_ids"].tolist())
    assert statistics.num_tokens == report.num_tokens == 4 * 19
    for ours, theirs in zip(statistics.qualities(), report.exits, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
        assert ours.agreement == pytest.approx(theirs.agreement)


def test_nothing_measured_is_no_qualities(tiny_model: Any) -> None:
    with LayerSkipRecipe(tiny_model(), JOINT).measure() as statistics:
        pass
    assert statistics.qualities() == []


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past_hooks", [False, True], ids=["call", "forward"])
def test_adapters_alone_are_trained(tiny_model: Any, past_hooks: bool) -> None:
    """peft calls the model, or, before 0.21, its `forward`, past all hooks."""
    peft = pytest.importorskip("peft")
    base, inputs = tiny_model(), batch()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    if past_hooks:
        model.base_model.forward = lambda *args, **kwargs: base.forward(*args, **kwargs)
    signature = inspect.signature(base.forward)
    recipe = LayerSkipRecipe(model, JOINT)
    assert inspect.signature(base.forward) == signature  # from which Trainer chooses the columns of the data
    losses, _ = naive_losses(tiny_model(), inputs)  # new adapters change nothing
    items = (inputs["labels"][:, 1:] != IGNORED).sum()
    expected = (0.1 * losses[1] + 0.3 * losses[2] + 0.6 * losses[3]) / items
    loss = model(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    with recipe.measure() as statistics:
        model.eval()(**inputs)
    assert statistics.num_tokens == items
    recipe.detach()
    assert "forward" not in vars(base)
    assert not {"layerskip", "layerskip_forward"} & set(vars(base))


# --- models that can't be trained ------------------------------------------------------------------------------------


def test_models_that_are_no_decoders_are_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=32, **small)
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    for model in (nn.Linear(2, 2), BertModel(bert), BertForMaskedLM(bert), T5ForConditionalGeneration(t5)):
        with pytest.raises(UnsupportedModelError):
            LayerSkipRecipe(model, JOINT)


def test_a_model_with_another_head_is_refused_and_left_as_it_was(tiny_model: Any) -> None:
    model = tiny_model()

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Doubled
    names = [set(vars(module)) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match="Doubled"):
        LayerSkipRecipe(model, JOINT)
    assert [set(vars(module)) for module in model.modules()] == names
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_a_rotation_beyond_the_depth_is_refused(tiny_model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="4 layers"):
        LayerSkipRecipe(tiny_model(), LayerSkipConfig(rotation=5))
    assert LayerSkipRecipe(tiny_model(), LayerSkipConfig(rotation=4)).rotation == 4
    assert LayerSkipRecipe(tiny_model(), LayerSkipConfig()).rotation == 4  # 8, but for the depth


def test_a_mixture_of_experts_keeps_its_balancing_loss() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model = MixtralForCausalLM(config).train()
    expected = model(**batch()).loss
    LayerSkipRecipe(model, PLAIN).begin_step(0, 1)
    assert model(**batch()).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_models_whose_layers_share_a_bias_over_the_batch_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        LayerSkipRecipe(model, JOINT)
