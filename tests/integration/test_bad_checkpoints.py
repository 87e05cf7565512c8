"""Everything that can be wrong with a checkpoint has an error of its own that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.loading import plan as plan_module
from layerskip.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    LayerSkipError,
    OutOfMemoryError,
    TokenizerError,
    UnsupportedModelError,
    WeightsError,
)
from layerskip.model import cache as cache_module
from layerskip.model.config.families import FAMILIES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def good(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tokenizer=True, num_hidden_layers=3)


@pytest.fixture(scope="module")
def good_shards(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(max_shard_size="40KB")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A checkpoint of one file, to be broken."""
    return Path(shutil.copytree(good, tmp_path / "single"))


@pytest.fixture
def shards(good_shards: Path, tmp_path: Path) -> Path:
    """A checkpoint of several files, to be broken."""
    return Path(shutil.copytree(good_shards, tmp_path / "shards"))


def refusal(error: type[LayerSkipError], name: Path | str, *words: str, **options: Any) -> None:
    """Loading must raise exactly this error, with these words, naming the checkpoint's folder or file where it can."""
    with pytest.raises(error) as caught:
        layerskip.load(str(name), **{"device": "cpu", **options})
    assert caught.type is error, caught.value
    for word in words:
        assert word in str(caught.value)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_the_unbroken_ones_load(folder: Path, shards: Path) -> None:
    for each in (folder, shards):
        assert layerskip.load(str(each), device="cpu").logits([1, 2]).isfinite().all()


# Where it is


def test_no_name() -> None:
    refusal(CheckpointNotFoundError, "", "no model was named", "demo", "owner/name")


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "/no/such/folder", "~/nothing", "a/b/c", "../x"])
def test_no_such_folder(name: str) -> None:
    refusal(CheckpointNotFoundError, name, f"there is no folder or file {name!r}", "hub id", "demo", "smollm2")


@pytest.mark.parametrize("name", ["owner/na me", "owner/x--y", "-owner/name", "owner/"])
def test_malformed_hub_id(name: str) -> None:
    refusal(CheckpointError, name, repr(name), "not a hub id")


def test_a_file(folder: Path) -> None:
    refusal(CheckpointError, folder / WEIGHTS, "is a file", "folder")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    refusal(CheckpointError, tmp_path, str(tmp_path), "not a checkpoint", "no config.json")


# config.json


@pytest.mark.parametrize("content", ["", "{", "{'model_type': 'llama'}", b"\xff\xfe\x00"])
def test_config_that_is_no_json(folder: Path, content: str | bytes) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(CheckpointError, folder, str(folder / "config.json"), "can't be read as JSON")


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    refusal(CheckpointError, folder, "must hold a JSON object", "list")


def test_unsupported_configs(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba")
    refusal(UnsupportedModelError, folder, "'mamba'", ", ".join(sorted(FAMILIES)))
    edit_json(folder / "config.json", model_type="llama", attention_chunk_size=64)
    refusal(UnsupportedModelError, folder, "'attention_chunk_size' = 64")
    edit_json(folder / "config.json", attention_chunk_size=None, quantization_config={"quant_method": "bitsandbytes"})
    refusal(UnsupportedModelError, folder, "quantized (bitsandbytes)")


def test_config_without_a_size(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=None)
    refusal(CheckpointError, folder, "'hidden_size'")


def test_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    lm = layerskip.load(str(folder), device="cpu")
    with pytest.raises(CheckpointError, match=r"generation_config\.json can't be read as JSON"):
        lm.generate([[1, 2]], max_new_tokens=2)


# Weights


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refusal(WeightsError, folder, str(folder), "no weights", WEIGHTS, INDEX)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_read(folder: Path, file: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    refusal(WeightsError, folder, file, "pickled", "run code", "save_pretrained")


def test_missing_shard(shards: Path) -> None:
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    second.unlink()
    refusal(WeightsError, shards, "1 weight files", "missing", repr(second.name))
    first.unlink()
    refusal(WeightsError, shards, "2 weight files", repr(first.name))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_shard(shards: Path, kept: float) -> None:
    """Cut to nothing, in the header's length, in the header, in the middle, before the last byte."""
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    refusal(WeightsError, shards, str(shard), "truncated", "download it again")


def test_weights_of_another_format(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html>" * 100)
    refusal(WeightsError, folder, str(folder / WEIGHTS), "can't be read as safetensors")


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
    refusal(WeightsError, folder, str(folder / WEIGHTS), "download it again")


def test_index_that_is_no_json(shards: Path) -> None:
    (shards / INDEX).write_text("{")
    refusal(CheckpointError, shards, INDEX, "can't be read as JSON")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"model.norm.weight": 3}])
def test_index_without_a_map(shards: Path, weight_map: Any) -> None:
    edit_json(shards / INDEX, weight_map=weight_map)
    refusal(WeightsError, shards, INDEX, "weight_map")


def test_index_names_a_tensor_that_is_not_there(shards: Path) -> None:
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[K_PROJ])
    edit_json(shards / INDEX, weight_map={**weight_map, K_PROJ: other})
    refusal(WeightsError, shards, repr(K_PROJ), other, "doesn't have it")


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop(K_PROJ))
    refusal(WeightsError, folder, "lacks 1 of", repr(K_PROJ))


def test_missing_head(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight"))
    refusal(WeightsError, folder, "lacks 1 of", "'lm_head.weight'")


def test_unknown_tensor(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refusal(WeightsError, folder, "1 tensors", repr(name), "doesn't use")


def test_another_number_of_layers(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    refusal(WeightsError, folder, "9 tensors", "'model.layers.2.input_layernorm.weight'")
    edit_json(folder / "config.json", num_hidden_layers=4)
    refusal(WeightsError, folder, "lacks 9 of 39", "'model.layers.3.")


def test_wrong_shape(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({K_PROJ: torch.zeros(16, 31)}))
    refusal(WeightsError, folder, repr(K_PROJ), "(16, 31)", "(16, 32)")


def test_integer_tensor(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({K_PROJ: torch.zeros(16, 32, dtype=torch.int8)}))
    refusal(WeightsError, folder, repr(K_PROJ), "torch.int8", "floating point")


# Tokenizer


def test_ids_need_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    lm = layerskip.load(str(folder), device="cpu")
    (result,) = lm.generate([[5, 6, 7]], max_new_tokens=3, ignore_eos=True)
    assert len(result.token_ids) == 3
    assert result.text == ""
    assert len(lm.score([[1, 2, 3]])[0].token_logprobs) == 2
    for call in (lambda: lm.generate(["text"]), lambda: lm.score(["text"]), lambda: lm.generate([[1]], stop=("x",))):
        with pytest.raises(TokenizerError) as error:
            call()
        for words in (str(folder), "no tokenizer", "tokenizer.json", "token ids"):
            assert words in str(error.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "Unheard"}}'])
def test_broken_tokenizer(folder: Path, content: str, demo_config: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(content)
    lm = layerskip.load(str(folder), device="cpu")
    with pytest.raises(TokenizerError) as error:
        lm.generate(["text"])
    assert f"the tokenizer in {folder} can't be read" in str(error.value)
    assert lm.logits([1, 2]).shape == (2, demo_config["vocab_size"])


# Options


def test_unknown_dtype_and_device(folder: Path) -> None:
    refusal(InvalidArgumentError, folder, "dtype 'int4'", "float32, bfloat16, float16", dtype="int4")
    refusal(InvalidArgumentError, folder, "device 'tpu9'", "cuda:N", device="tpu9")
    refusal(InvalidArgumentError, folder, "device 'meta'", "cpu", device="meta")


@pytest.mark.parametrize("max_context", [0, -5, 129])
def test_context_beyond_the_model(folder: Path, max_context: int) -> None:
    refusal(InvalidArgumentError, folder, f"max_context {max_context}", "1..128", max_context=max_context)


# Memory


def test_weights_that_do_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 1000)
    refusal(OutOfMemoryError, folder, str(folder), "GiB", "free on cpu", "16-bit dtype", "smaller model")
    monkeypatch.setattr(plan_module, "free_memory", lambda device: None)
    layerskip.load(str(folder), device="cpu")


def test_a_16_bit_dtype_needs_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = open_checkpoint(str(folder)).num_parameters
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 3 * size)
    refusal(OutOfMemoryError, folder, "16-bit")
    layerskip.load(str(folder), device="cpu", dtype="bfloat16")


def test_a_cache_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = layerskip.load(str(folder), device="cpu")
    monkeypatch.setattr(cache_module, "free_memory", lambda device: 1000)
    for call in (lambda: lm.generate([[1, 2]], max_new_tokens=20), lm.new_session, lambda: lm.logits([1, 2])):
        with pytest.raises(OutOfMemoryError, match="a cache of 1 x"):
            call()
