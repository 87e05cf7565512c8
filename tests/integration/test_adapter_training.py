"""`layerskip train --exit-adapters`: the model stays as it is, and what is trained drafts for it."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, WEIGHTS_FILE
from layerskip.cli.main import main
from layerskip.training.exit_adapters.frozen import FrozenModel, Pass
from layerskip.training.exit_adapters.module import AdaptedModel

SHORT = "--sequence-length 32 --batch-size 4 --log-steps 2 --save-steps 6 --held-out 0.25 --precision float32".split()


def train(output: Path, *flags: Any, code: int = 0) -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        assert main(["train", *map(str, flags), *SHORT, "--output", str(output), "--json"]) == code
    if code:
        return {"error": errors.getvalue()}
    record: dict[str, Any] = json.loads(out.getvalue())
    return record


@pytest.fixture(scope="module")
def start(
    training_start: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A random model with a tokenizer of the texts, and the texts."""
    shape, texts = training_start()
    folder = tmp_path_factory.mktemp("base")
    train(folder / "run", "--config", shape, "--data", texts, "--max-steps", 1)
    write_tiny(folder / "model", vocab_size=300)
    for file in (folder / "run").glob("tokenizer*"):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return {"model": folder / "model", "texts": texts}


@pytest.fixture(scope="module")
def trained(start: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    train(output, *flags(start), "--max-steps", 60, "--learning-rate", "3e-3")
    return output


def flags(start: dict[str, Path]) -> list[Any]:
    return ["--model", start["model"], "--data", start["texts"], "--exit-adapters", 1, 3, "--adapter-vocabulary", 120]


def test_adapters_learn_what_the_last_layer_says(start: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    losses = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    found = json.loads((trained / "training.json").read_text())["exits"]
    assert [quality["exit_layer"] for quality in found] == [1, 3]
    begun = train(tmp_path / "begun", *flags(start), "--max-steps", 1)["exits"]
    assert found[0]["agreement"] > begun[0]["agreement"] + 0.02
    assert found[1]["agreement"] > begun[1]["agreement"] - 0.02  # begins as the last layer, on that layer's own input


def test_the_engine_agrees_with_the_trainer(start: dict[str, Path], trained: Path) -> None:
    """Adapters give the same logits in training and in decoding."""
    content = json.loads((trained / DESCRIPTION_FILE).read_text())
    for adapter in content["adapters"]:
        agreed, tokens = map(sum, zip(*adapter["by_confidence"], strict=True))
        assert adapter["agreement"] == pytest.approx(agreed / tokens, abs=1e-4)
        assert adapter["vocabulary_size"] == 120
    check_engine(start["model"], trained, start["texts"] / "0.txt", [1, 3])


def check_engine(folder: Path, trained: Path, text_file: Path, exits: list[int]) -> None:
    """Logits at exits are those of the trainer's modules; with native kernels nearly, since adapters are in int8."""
    content = json.loads((trained / DESCRIPTION_FILE).read_text())
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "exit_adapters": trained}
    lms = {kernels: layerskip.load(str(folder), kernels=kernels, **options) for kernels in ("torch", "auto")}
    text = lms["auto"].encode([text_file.read_text()])[0][:100]
    weights = load_file(trained / WEIGHTS_FILE)
    tokens = weights[f"exit_{exits[0]}.token_ids"].long()
    base, layers = AutoModelForCausalLM.from_pretrained(folder), content["adapters"][0]["value_layers"]
    assert len(layers) > 1
    assert layers[-1] == base.config.num_hidden_layers - 1
    model = AdaptedModel(base, exits, tokens=tokens.tolist(), value_layers=layers)
    found = model.eval().frozen.run(torch.tensor([text]), None)
    values = model._earlier_values(found, None)
    for exit_layer in exits:
        adapter, prefix = model.adapters[f"exit_{exit_layer}"], f"exit_{exit_layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        del own["token_ids"]
        adapter.load_state_dict(own)
        with torch.no_grad():
            expected = model.logits(model._adapt(exit_layer, found, values)[0], model.head_rows)
        others = torch.ones(300, dtype=torch.bool).index_fill(0, tokens, False)
        logits = {kernels: lm.logits(text, exit_layer=exit_layer) for kernels, lm in lms.items()}
        torch.testing.assert_close(logits["torch"][:, tokens], expected, rtol=1e-3, atol=1e-3)
        for ours in logits.values():
            assert (ours[:, tokens].argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
            assert ours[:, others].eq(-torch.inf).all()


def test_drafts_are_accepted_and_the_text_stays(start: dict[str, Path], trained: Path) -> None:
    lm = layerskip.load(str(start["model"]), dtype="float32", device="cpu", exit_adapters=trained)
    plain = layerskip.load(str(start["model"]), dtype="float32", device="cpu")
    prompts = lm.encode([(start["texts"] / f"{i}.txt").read_text()[:40] for i in range(3)])
    expected = plain.generate(prompts, generation_strategy="autoregressive", max_new_tokens=40)
    for exit_layer in (1, 3):
        results = lm.generate(prompts, exit_layer=exit_layer, num_speculations=3, max_new_tokens=40)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        assert sum(r.stats.accepted_by["exit_adapter"] for r in results) > 5


def test_the_base_is_untouched_and_nothing_of_it_is_stored(start: dict[str, Path], trained: Path) -> None:
    names = load_file(trained / WEIGHTS_FILE).keys()
    assert {name.split(".")[0] for name in names} == {"exit_1", "exit_3"}
    assert not (trained / "model.safetensors").exists()


def test_a_run_that_was_interrupted_goes_on(start: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from layerskip.training.safe_trainer import SafeTrainer

    whole = tmp_path / "whole"
    train(whole, *flags(start), "--max-steps", 12)
    step, save = SafeTrainer.training_step, tmp_path / "cut"

    def stop_after_eight(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SafeTrainer, "training_step", stop_after_eight)
        train(save, *flags(start), "--max-steps", 12, code=130)
    assert (save / "checkpoint-6").is_dir()
    assert not (save / DESCRIPTION_FILE).exists()
    train(save, *flags(start), "--max-steps", 12, "--resume")
    ours, theirs = load_file(save / WEIGHTS_FILE), load_file(whole / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kept_states_change_nothing_and_spare_the_model(
    start: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, passes = FrozenModel._keeping, 0

    def counted(self: FrozenModel, found: Pass) -> Any:
        nonlocal passes
        passes += 1
        return whole(self, found)

    monkeypatch.setattr(FrozenModel, "_keeping", counted)
    again = [*flags(start), "--max-steps", 30, "--batch-size", 2]
    train(tmp_path / "plain", *again)
    without, passes = passes, 0
    train(tmp_path / "kept", *again, "--cache-states", tmp_path / "states")
    assert 0 < passes < without
    passes = 0
    train(tmp_path / "again", *again, "--cache-states", tmp_path / "states")  # the states of the run before
    assert passes == 0
    expected = load_file(tmp_path / "plain" / WEIGHTS_FILE)
    for run in ("kept", "again"):
        found = load_file(tmp_path / run / WEIGHTS_FILE)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    train(tmp_path / "other", *again, "--adapter-value-layers", 1, "--cache-states", tmp_path / "states")
    assert passes > 0  # other states: computed anew


def test_training_goes_on_from_trained_adapters(start: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    more = [*flags(start)[:-2], "--adapters-from", trained, "--max-steps", 1, "--learning-rate", "1e-6"]
    before = json.loads((trained / "training.json").read_text())["exits"]
    for old, new in zip(before, train(tmp_path / "more", *more)["exits"], strict=True):
        assert new["agreement"] == pytest.approx(old["agreement"], abs=0.02)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "phi3", "olmo2", "granite"])
@pytest.mark.parametrize("loss", ["ce", "lk"])
def test_every_family_and_loss(start: dict[str, Path], tmp_path: Path, family: str, loss: str) -> None:
    write_tiny(tmp_path / "model", family, vocab_size=300)
    for file in start["model"].glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    given = ["--model", tmp_path / "model", "--data", start["texts"], "--exit-adapters", 2, "--adapter-loss", loss]
    train(tmp_path / "run", *given, "--max-steps", 2)
    lm = layerskip.load(
        str(tmp_path / "model"), dtype="float32", device="cpu", kernels="torch", exit_adapters=tmp_path / "run"
    )
    assert len(lm.generate([[5, 7, 9]], exit_layer=2, max_new_tokens=5)[0].token_ids) == 5


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "granite", "smollm3"])
def test_the_engine_agrees_with_the_trainer_in_other_families(
    start: dict[str, Path], tmp_path: Path, family: str
) -> None:
    write_tiny(tmp_path / "model", family, vocab_size=300)
    for file in start["model"].glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    given = ["--model", tmp_path / "model", "--data", start["texts"], "--exit-adapters", 2, "--adapter-vocabulary", 120]
    train(tmp_path / "run", *given, "--max-steps", 6, "--learning-rate", "3e-2")
    weights = load_file(tmp_path / "run" / WEIGHTS_FILE)
    assert weights["exit_2.value_proj.weight"].abs().mean() > 1e-2
    check_engine(tmp_path / "model", tmp_path / "run", start["texts"] / "0.txt", [2])


def test_models_with_experts_are_refused(start: dict[str, Path], tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", "qwen3_moe", vocab_size=300)
    given = ["--model", tmp_path / "model", "--data", start["texts"], "--exit-adapters", 2, "--max-steps", 1]
    assert "(qwen3_moe) has layers with experts" in train(tmp_path / "run", *given, code=2)["error"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--exit-adapters", 4], "exit_adapters names exit 4, and the model has 4 layers"),
        (["--exit-adapters", 1, 1], "exit_adapters must be different numbers"),
        (["--exit-adapters", 1, "--lora-rank", 4], "lora_rank and exit_adapters don't go together"),
        (["--exit-adapters", 1, "--adapter-vocabulary", 301], "adapter_vocabulary is 301"),
        (["--exit-adapters", 1, "--adapters-from", "."], "has no exit adapters"),
        (["--adapter-vocabulary", 20], "name their exits in exit_adapters"),
    ],
)
def test_settings_that_can_not_be(start: dict[str, Path], tmp_path: Path, more: list[Any], message: str) -> None:
    given = ["--model", start["model"], "--data", start["texts"], "--max-steps", 1, *more]
    assert message in train(tmp_path / "run", *given, code=2)["error"]
