"""`layerskip train` from its arguments to a checkpoint that other programs load."""

import io
import json
import math
import random
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip
from layerskip.cli.main import main
from layerskip.training.config import TrainingConfig
from layerskip.training.data.encode import encode_document
from layerskip.training.data.reading.documents import ChatDocument, CompletionDocument
from layerskip.training.settings_file import read_settings

SHORT = "--sequence-length 32 --batch-size 4 --max-steps 6 --log-steps 1 --save-steps 3 --learning-rate 3e-3".split()
TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def train(output: Path, *flags: Any) -> dict[str, Any]:
    """Train in float32, whatever the machine is better at; what is printed, which must be one line of JSON."""
    precision = [] if "--precision" in flags else ["--precision", "float32"]
    with redirect_stdout(io.StringIO()) as out:
        code = main(["train", *map(str, flags), *precision, "--output", str(output), "--json"])
    assert code == 0
    (line,) = out.getvalue().splitlines()
    record: dict[str, Any] = json.loads(line)
    return record


def losses(output: Path) -> list[float]:
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def start(training_start: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return training_start()


@pytest.fixture(scope="module")
def texts(start: tuple[Path, Path]) -> Path:
    return start[1]


@pytest.fixture(scope="module")
def scratch(start: tuple[Path, Path]) -> list[Any]:
    """Flags of a run from scratch."""
    return ["--config", start[0], "--data", start[1], "--held-out", 0.2, *SHORT]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, scratch: list[Any]) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "deep" / "first"
    return output, train(output, *scratch, "--exit-loss", "kl", "--dropout-max", 0.2, "--rotation", 2)


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A model to go on with; its tokenizer is the demo's."""
    return tiny_checkpoint(tokenizer=True, tie_word_embeddings=False)


# From scratch


def test_what_a_run_reports(first_run: tuple[Path, dict[str, Any]]) -> None:
    output, result = first_run
    assert (result["output"], result["interrupted"], result["step"]) == (str(output), False, 6)
    assert result["num_tokens"] == 6 * 4 * 32
    assert result["train_loss"] == losses(output)[-1]
    assert result["loss"] == result["exits"][-1]["loss"] < math.log(300) + 0.5
    assert [quality["exit_layer"] for quality in result["exits"]] == [1, 2, 3, 4]
    assert all(0 <= quality["agreement"] <= 1 for quality in result["exits"])
    assert result["exits"][-1]["agreement"] == 1
    assert len(result["speedups"]) == 4


def test_what_a_run_leaves(first_run: tuple[Path, dict[str, Any]], scratch: list[Any]) -> None:
    output, result = first_run
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("training.toml", "training.json", "data.json", "log.jsonl", "agreement.png", "checkpoint-3", "checkpoint-6"),
    }
    assert len(losses(output)) == 6
    assert json.loads((output / "training.json").read_text())["loss"] == result["loss"]
    assert (output / "agreement.png").read_bytes().startswith(b"\x89PNG")
    settings = read_settings(output / "training.toml", TrainingConfig)
    assert settings.start.config == str(scratch[1])
    assert settings.recipe.dropout_schedule == "exponential"
    assert json.loads((output / "config.json").read_text())["layerskip"] == {
        "dropout_max": 0.2,
        "dropout_schedule": "exponential",
        "exit_loss": "kl",
        "exit_loss_scale": 0.2,
        "exit_weights": "depth",
        "curriculum": "rotational",
        "rotation": 2,
        "exit_layers": [],
        "stop_gradient": False,
    }


def test_everyone_loads_the_result(first_run: tuple[Path, dict[str, Any]]) -> None:
    """The same greedy text here and in transformers, with and without early exits."""
    output, _ = first_run
    prompt = "the red fox"
    lm = layerskip.load(str(output), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    assert ids.tolist() == [tokenizer(prompt)["input_ids"]]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    expected = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert model.generate(ids, assistant_early_exit=2, **options)[0, ids.shape[1] :].tolist() == expected
    for exit_layer in (None, 2):
        (result,) = lm.generate([prompt], max_new_tokens=16, ignore_eos=True, exit_layer=exit_layer)
        assert list(result.token_ids) == expected
        assert result.text == tokenizer.decode(expected)


def test_settings_of_one_run_make_another_the_same(first_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, result = first_run
    again = train(tmp_path / "again", "--toml", output / "training.toml")
    assert same(tmp_path / "again", output)
    assert (again["loss"], again["exits"]) == (result["loss"], result["exits"])
    assert (tmp_path / "again" / "training.toml").read_text() == (output / "training.toml").read_text()


def test_a_flag_on_top_of_settings(first_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    settings = first_run[0] / "training.toml"
    assert train(tmp_path / "shorter", "--toml", settings, "--max-steps", 2, "--exit-loss", "lk")["step"] == 2
    lines = (settings.read_text().splitlines(), (tmp_path / "shorter" / "training.toml").read_text().splitlines())
    changed = [(old, new) for old, new in zip(*lines, strict=True) if old != new]
    assert changed == [('exit_loss = "kl"', 'exit_loss = "lk"'), ("max_steps = 6", "max_steps = 2")]


def test_the_parts_of_the_recipe_matter(
    first_run: tuple[Path, dict[str, Any]], scratch: list[Any], tmp_path: Path
) -> None:
    recipe = ["--exit-loss", "kl", "--dropout-max", 0.2, "--rotation", 2]
    for name, flags in {
        "lk": ["--exit-loss", "lk"],
        "ce": ["--exit-loss", "ce"],
        "stop": ["--stop-gradient"],
        "no exits": ["--exit-loss-scale", 0],
        "no dropout": ["--dropout-max", 0],
        "other seed": ["--seed", 1],
    }.items():
        assert math.isfinite(train(tmp_path / name, *scratch, *recipe, *flags)["loss"])
        assert not same(tmp_path / name, first_run[0]), name
    found = json.loads((tmp_path / "stop" / "config.json").read_text())["layerskip"]
    assert found["stop_gradient"] is True


def test_accumulated_batches_are_one(scratch: list[Any], tmp_path: Path) -> None:
    """Layer dropout included: a sample skips the same layers, whichever of the batches it is in."""
    train(tmp_path / "whole", *scratch, "--dropout-max", 0.5, "--dropout-schedule", "constant")
    halves = ["--batch-size", 2, "--gradient-accumulation", 2]
    result = train(tmp_path / "halves", *scratch, "--dropout-max", 0.5, "--dropout-schedule", "constant", *halves)
    assert result["num_tokens"] == 6 * 4 * 32
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], atol=1e-3, rtol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator's own precision counts there")
def test_the_precision_of_the_computation(
    training_start: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is what the hardware has, from a width on; weights, and what is saved of them, are float32 in any case."""
    shape, data = training_start(texts=4, hidden_size=128)
    flags = ["--config", shape, "--data", data, "--held-out", 0.2, *SHORT]
    records = {name: train(tmp_path / name, *flags, "--precision", name) for name in ("float32", "bfloat16")}
    for has in (None, "AVX512_BF16"):
        name = "float32" if has is None else "bfloat16"
        monkeypatch.setattr("layerskip.training.precision.cpu_bfloat16", lambda has=has: has)
        auto = tmp_path / f"auto {has}"
        assert (train(auto, *flags, "--precision", "auto")["precision"], records[name]["precision"]) == (name, name)
        assert same(auto, tmp_path / name)
        assert {tensor.dtype for tensor in weights(auto).values()} == {torch.float32}
    assert not same(tmp_path / "float32", tmp_path / "bfloat16")
    assert records["bfloat16"]["loss"] == pytest.approx(records["float32"]["loss"], abs=0.05)


def test_streaming(scratch: list[Any], tmp_path: Path) -> None:
    result = train(tmp_path / "run", *scratch, "--streaming")
    assert len(losses(tmp_path / "run")) == result["step"] == 6
    assert len(result["exits"]) == 4
    layerskip.load(str(tmp_path / "run"), device="cpu").generate(["the"], max_new_tokens=2)


def test_held_out_data_smaller_than_a_batch_counts(scratch: list[Any], tmp_path: Path) -> None:
    assert train(tmp_path / "few", *scratch, "--eval-tokens", 64)["loss"] > 0
    nothing = train(tmp_path / "nothing", *scratch, "--held-out", 0)
    assert (nothing["loss"], nothing["exits"], nothing["plot"]) == (None, [], None)
    (tmp_path / "tail.txt").write_text("word and more " * 400 + "\n" * 3000)  # what would be held out is blank
    assert train(tmp_path / "blank", *scratch, "--data", tmp_path / "tail.txt")["loss"] is None


def test_tensorboard(scratch: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path / "run", *scratch, "--report-to", "tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


# Going on with a model


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("bfloat16", True), ("float32", True)])
def test_continual_pretraining_keeps_dtype_and_tensors(
    tiny_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path, dtype: str, tied: bool
) -> None:
    start, output = tiny_checkpoint(tokenizer=True, dtype=dtype, tie_word_embeddings=tied), tmp_path / "run"
    train(output, "--model", start, "--data", texts, *SHORT)
    config = json.loads((output / "config.json").read_text())
    assert (config["dtype"], config["layerskip"]["dropout_schedule"]) == (dtype, "constant")
    before, after = weights(start), weights(output)
    assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{dtype}"}
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    assert not any(before[name].equal(after[name]) for name in before if name.endswith("proj.weight"))
    assert layerskip.load(str(output), device="cpu").logits([1, 2]).isfinite().all()


def test_another_dtype_on_demand(base: Path, texts: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "--model", base, "--data", texts, *SHORT, "--max-steps", 1, "--save-dtype", "float16")
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float16}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float16"


def test_lora_adapts_a_frozen_model(base: Path, texts: Path, tmp_path: Path) -> None:
    """Adapters are all that changes: the result differs from the model by matrices of their rank, and in no others."""
    output = tmp_path / "run"
    train(output, "--model", base, "--data", texts, *SHORT, "--lora-rank", 2, "--dropout-max", 0.2)
    assert not (output / "adapter_config.json").exists()
    before, after = weights(base), weights(output)
    assert before.keys() == after.keys()
    for name in before:
        change = (after[name] - before[name]).double()
        if not name.endswith("proj.weight"):
            assert not change.any(), name
            continue
        sizes = torch.linalg.svdvals(change)
        assert sizes[0] > 1e-4, name
        assert sizes[2] < 1e-2 * sizes[0], name  # but for rounding
    lm = layerskip.load(str(output), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(
        lm.logits([5, 6, 7]), model(torch.tensor([[5, 6, 7]])).logits[0].detach(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_only_answers_are_learned(base: Path, tmp_path: Path, kind: str) -> None:
    """The loss of the first step is that of the answers alone, each read in its own context."""
    pick, words = random.Random(1), "red foxes run over lazy dogs while rain falls".split()
    start = tmp_path / "start"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    records: list[dict[str, Any]] = []
    documents: list[CompletionDocument | ChatDocument] = []
    for _ in range(3):
        asked, told = (" ".join(pick.choices(words, k=4)) for _ in range(2))
        if kind == "chat":
            said = ({"role": "user", "content": asked}, {"role": "assistant", "content": told})
            records.append({"messages": said})
            documents.append(ChatDocument(origin="", messages=said))
        else:
            records.append({"prompt": asked, "completion": " " + told})
            documents.append(CompletionDocument(origin="", prompt=asked, completion=" " + told))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    total, count = 0.0, 0
    for document in documents:
        (encoded,) = encode_document(document, tokenizer)
        ids, learned = torch.tensor(encoded.ids), torch.tensor(encoded.learned)
        assert 0 < learned.sum() < 0.8 * len(learned)
        with torch.no_grad():
            nats = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, count = total + nats[learned[1:]].sum().item(), count + int(learned[1:].sum())
    flags = ["--held-out", 0, "--sequence-length", 128, "--batch-size", 1, "--max-steps", 1, "--log-steps", 1]
    recipe = ["--dropout-max", 0, "--exit-loss-scale", 0]
    train(tmp_path / "run", "--model", start, "--data", tmp_path / "data.jsonl", *flags, *recipe)
    assert losses(tmp_path / "run") == [pytest.approx(total / count, abs=1e-4)]
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEMPLATE
