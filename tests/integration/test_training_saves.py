"""Folders that people have, with settings that transformers doesn't save, and what `layerskip train` makes of them."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, TrainingArguments

import layerskip
from layerskip.cli.main import main

FLAGS = (
    "--sequence-length 32 --batch-size 2 --max-steps 2 --save-steps 1 --log-steps 1 --held-out 0 --precision float32"
).split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train(output: Path, *flags: Any) -> str:
    """Train, which must succeed; what is said meanwhile."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        code = main(["train", *map(str, flags), "--output", str(output)])
    assert code == 0, err.getvalue()
    return err.getvalue()


def settings(folder: Path, name: str = "generation_config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


@pytest.fixture(scope="module")
def texts(training_start: Callable[..., tuple[Path, Path]]) -> Path:
    return training_start(texts=3)[1]


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    made = tiny_checkpoint(tokenizer=True, tie_word_embeddings=False, num_hidden_layers=2)
    return Path(shutil.copytree(made, tmp_path / "base"))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("written", "left_out", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, "temperature, top_p", {}),
        ({"do_sample": True, "temperature": 0.6}, None, {"do_sample": True, "temperature": 0.6}),
        (
            {"cache_implementation": "mine", "repetition_penalty": 1.5},
            "cache_implementation",
            {"repetition_penalty": 1.5},
        ),
        ({"num_return_sequences": 4, "length_penalty": 2.0}, "num_return_sequences, length_penalty", {}),
    ],
)  # fmt: skip
def test_generation_configs_that_transformers_refuses(
    base: Path, texts: Path, tmp_path: Path, written: dict[str, Any], left_out: str | None, kept: Any, lora: bool
) -> None:
    (base / "generation_config.json").write_text(json.dumps({**written, "eos_token_id": [1, 5], "bos_token_id": 0}))
    output = tmp_path / "run"
    said = train(output, "--model", base, "--data", texts, *FLAGS, *(["--lora-rank", "2"] if lora else []))
    note = f"left out of generation_config.json, not being valid there: {left_out}\n"
    assert (note in said) == (left_out is not None)
    folders = [output] if lora else [output, output / "checkpoint-1", output / "checkpoint-2"]
    for folder in folders:
        found = settings(folder)
        assert {name: found.get(name) for name in kept} == kept
        assert not {*(left_out or "").split(", ")} & set(found)
        assert set(found["eos_token_id"]) >= {1, 5}
        GenerationConfig.from_pretrained(folder).validate(strict=True)


def test_settings_of_generation_in_config_json(base: Path, texts: Path, tmp_path: Path) -> None:
    """As it was done before there was a file of their own."""
    (base / "generation_config.json").unlink(missing_ok=True)
    config = {**settings(base, "config.json"), "temperature": 0.6, "max_length": 100, "early_stopping": "x"}
    (base / "config.json").write_text(json.dumps(config))
    assert "temperature, early_stopping" in train(tmp_path / "run", "--model", base, "--data", texts, *FLAGS)
    assert settings(tmp_path / "run")["max_length"] == 100
    assert "temperature" not in (tmp_path / "run" / "config.json").read_text()


def test_the_trainer_alone_saves_it_too(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.temperature = 0.6
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    trainer = layerskip.LayerSkipTrainer(model, arguments, layerskip=layerskip.LayerSkipConfig(), train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "temperature" not in settings(tmp_path / "saved")


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_that_the_configuration_calls_tied(base: Path, texts: Path, tmp_path: Path, lora: bool) -> None:
    """It differs from the embedding, so transformers uses it; what is saved says so, and loads the same everywhere."""
    (base / "config.json").write_text(json.dumps({**settings(base, "config.json"), "tie_word_embeddings": True}))
    output = tmp_path / "run"
    train(output, "--model", base, "--data", texts, *FLAGS, *(["--lora-rank", "2"] if lora else []))
    start, saved = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert (saved["lm_head.weight"] - start["lm_head.weight"]).abs().max() < 0.01
    for folder in [output] if lora else [output, output / "checkpoint-2"]:
        assert settings(folder, "config.json")["tie_word_embeddings"] is False
        ours = layerskip.load(str(folder), device="cpu", dtype="float32").logits([5, 6, 7])
        theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 6, 7]])).logits[0].detach()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_tied_head_in_the_file_stays_tied(tiny_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint(tokenizer=True, tie_word_embeddings=True, num_hidden_layers=2), base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    train(tmp_path / "run", "--model", base, "--data", texts, *FLAGS)
    saved = settings(tmp_path / "run", "config.json")["tie_word_embeddings"]
    assert saved is ("lm_head.weight" not in load_file(tmp_path / "run" / "model.safetensors"))


# Ends of answers


def chat_model(folder: Path, **generation: Any) -> Any:
    """A folder whose template ends turns with <|im_end|>, and whose configurations name </s> alone; its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return tokenizer


def write_chats(path: Path) -> Path:
    said = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(20)]
    path.write_text(json.dumps([{"messages": messages} for messages in said]))
    return path


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"], ["--streaming"]])
@pytest.mark.parametrize("named", ["one", "several", "none"])
def test_chats_end_where_the_template_ends_an_answer(base: Path, tmp_path: Path, flags: list[str], named: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    own: Any = {"one": tokenizer.eos_token_id, "several": [tokenizer.eos_token_id, 7], "none": None}[named]
    tokenizer = chat_model(base, **({} if own is None else {"eos_token_id": own}))
    output = tmp_path / "run"
    train(output, "--model", base, "--data", write_chats(tmp_path / "chats.json"), *FLAGS, *flags)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = {end, *(own if isinstance(own, list) else [tokenizer.eos_token_id])}
    folders = [output] if "--lora-rank" in flags else [output, output / "checkpoint-1"]
    for folder in folders:
        assert set(settings(folder)["eos_token_id"]) == expected
        lm = layerskip.load(str(folder), device="cpu")
        assert set(lm.eos_token_ids) == expected if hasattr(lm, "eos_token_ids") else True


def test_texts_leave_the_ends_alone(base: Path, texts: Path, tmp_path: Path) -> None:
    tokenizer = chat_model(base, eos_token_id=1)
    train(tmp_path / "run", "--model", base, "--data", texts, *FLAGS)
    ends = settings(tmp_path / "run")["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in (ends if isinstance(ends, list) else [ends])
