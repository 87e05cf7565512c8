"""Finding checkpoints, and what they consist of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import packages
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Tokenizer

import layerskip
from layerskip.checkpoint import checkpoint as checkpoint_module
from layerskip.checkpoint.checkpoint import DEMO_FOLDER, Checkpoint, open_checkpoint
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.files import cache_folder
from layerskip.text.tokenizer import TextTokenizer

TOKENS = [5, 3, 80, 41]


def test_shards_hold_the_same_network(tiny_checkpoint: Callable[..., Path]) -> None:
    single, sharded = tiny_checkpoint(), tiny_checkpoint(max_shard_size="40KB")
    assert (single / "model.safetensors").is_file()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    logits = [layerskip.load(str(folder), dtype="float32", device="cpu").logits(TOKENS) for folder in (single, sharded)]
    assert torch.equal(*logits)


def test_a_single_file_wins_over_an_index(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As in transformers."""
    shutil.copytree(tiny_checkpoint(max_shard_size="40KB"), tmp_path, dirs_exist_ok=True)
    shutil.copy(tiny_checkpoint(seed=1) / "model.safetensors", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    logits = layerskip.load(str(tmp_path), dtype="float32", device="cpu").logits(TOKENS)
    torch.testing.assert_close(logits, theirs(torch.tensor([TOKENS])).logits[0].detach(), rtol=0, atol=1e-4)


def test_one_shard_with_an_index(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Files may have any name; the index tells."""
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    names = list(load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    weight_map = dict.fromkeys(names, "weights.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    layerskip.load(str(tmp_path), device="cpu")


def test_open_tensors_outlive_their_file(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    lm = layerskip.load(str(tmp_path), device="cpu")
    before = lm.logits(TOKENS)
    shutil.rmtree(tmp_path)
    assert torch.equal(lm.logits(TOKENS), before)


def test_whoever_changes_transformers_tokenizer_is_heard(tiny_checkpoint: Callable[..., Path]) -> None:
    """Without being asked for, it isn't there; once it is, it is the one that is used."""
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(tokenizer=True))
    assert isinstance(checkpoint.text_tokenizer, TextTokenizer)
    before = len(checkpoint.tokenizer)
    checkpoint.tokenizer.add_tokens(["hello world"])
    assert checkpoint.text_tokenizer is checkpoint.tokenizer
    assert before in checkpoint.text_tokenizer.encode("hello world")


def test_transformers_reads_what_only_it_can(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    checkpoint = Checkpoint.in_folder(tmp_path)
    with caplog.at_level("INFO", logger="layerskip"):
        assert isinstance(checkpoint.text_tokenizer, GPT2Tokenizer)
    assert "transformers reads the tokenizer, which takes longer: its class is GPT2Tokenizer" in caplog.text
    assert checkpoint.text_tokenizer is checkpoint.tokenizer


def test_demo() -> None:
    checkpoint = open_checkpoint("demo")
    assert checkpoint.config.model_type == "llama"
    ids = checkpoint.text_tokenizer.encode("hello world")
    assert ids == checkpoint.tokenizer("hello world")["input_ids"]
    assert checkpoint.tokenizer.decode(ids, skip_special_tokens=True).strip() == "hello world"
    assert checkpoint.num_parameters == sum(
        tensor.numel() for tensor in load_file(DEMO_FOLDER / "model.safetensors").values()
    )


@pytest.mark.parametrize("spelling", ["absolute", "relative", "home"])
def test_folders(
    spelling: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "mine" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {"absolute": str(tmp_path / "mine" / "model"), "relative": "mine/model", "home": "~/mine/model"}[spelling]
    assert open_checkpoint(name).config.num_layers == 4


def test_a_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `demo`; the folder is ./NAME."""
    model, contents = packages.make_model(1)
    site = tmp_path / "site"
    shutil.copytree(DEMO_FOLDER, tmp_path / "some")
    packages.install_all(site, model, contents)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module, "MODELS", {"some": model})
    with packages.named("some", model, site):
        path = checkpoint_module.resolve("some")
        named, folder = open_checkpoint("some"), open_checkpoint("./some")
    assert named.files == GGUFFile(path, own_folder=cache_folder() / "models")
    assert (named.hugging_face_folder, folder.hugging_face_folder) == (None, Path("some"))


@pytest.mark.parametrize(
    ("generation", "own", "wanted"),
    [(None, 3, (3,)), ([4, 5], 3, (4, 5)), (6, 3, (6,)), ("silent", 3, (3,)), (None, None, ())],
)
def test_end_of_sequence(tmp_path: Path, generation: object, own: object, wanted: tuple[int, ...]) -> None:
    raw = json.loads((DEMO_FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": own}))
    if generation is not None:
        content = {} if generation == "silent" else {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert Checkpoint.in_folder(tmp_path, "").eos_token_ids == wanted


def test_mixed_dtypes(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    """A file may mix dtypes; each tensor is converted by itself."""
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    tensors = {key: tensor.clone() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    wanted = layerskip.load(str(tmp_path), dtype="float32", device="cpu").logits(TOKENS)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name].double()}, tmp_path / "model.safetensors")
    assert torch.equal(layerskip.load(str(tmp_path), dtype="float32", device="cpu").logits(TOKENS), wanted)
