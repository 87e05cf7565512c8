"""Saved quantized checkpoints: the same weights as quantizing at load, in a layout that others read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from safetensors.torch import load_file

from layerskip import LanguageModel, load
from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.writing import quantized as writing
from layerskip.checkpoint.writing.quantized import check_writable, write_quantized
from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.model.native.library import load_library

native_only = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
PROMPT = [list(range(3, 30))]


def write(folder: Path, output: Path, quantize: str = "int8") -> Path:
    write_quantized(Checkpoint.in_folder(folder), quantize, output)
    return output


def panels(lm: LanguageModel) -> list[torch.Tensor]:
    """All that native kernels read of layers and head."""
    network: Any = lm.decoder._network
    linears = [getattr(layer, name) for layer in network.layers for name in ("qkv", "o", "gate_up", "down")]
    return [part for linear in [*linears, network.head] for part in (linear._panels, linear._scales)]


@native_only
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("phi3", {}), ("gemma3_text", {}), ("llama", {"intermediate_size": 72}), ("qwen2", {})],
)
def test_weights_are_those_of_quantizing_at_load(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: str, tied: bool, model_type: str, sizes: Any
) -> None:
    folder = tiny_checkpoint(model_type, dtype="bfloat16", tie_word_embeddings=tied, **{**SIZES, **sizes})
    saved = load(str(write(folder, tmp_path / "saved", quantize)), device="cpu")
    at_load = load(str(folder), device="cpu", quantize=quantize)
    for one, other in zip(panels(saved), panels(at_load), strict=True):
        assert torch.equal(one, other)
    options: list[dict[str, Any]] = [{}, {"exit_layer": 2, "num_speculations": 3}]
    texts = [lm.generate(PROMPT, max_new_tokens=16, **way)[0].token_ids for lm in (saved, at_load) for way in options]
    assert texts == [texts[0]] * 4


def test_torch_reads_the_same_numbers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    output = write(tiny_checkpoint(**SIZES), tmp_path / "saved", "int4")
    one, other = (load(str(output), device="cpu", kernels=kernels) for kernels in ("torch", "auto"))
    states = [lm.decoder.embed(torch.tensor(PROMPT)) for lm in (one, other)]
    logits = []
    for lm, hidden in zip((one, other), states, strict=True):
        cache = lm.decoder.new_cache(1, 40)
        positions = lm.decoder.place(cache, [0], hidden.shape[1])
        logits.append(lm.decoder.unembed(lm.decoder.run_layers(hidden, positions, cache, 0, lm.decoder.num_layers)))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_int4_leaves_weights_without_whole_groups_in_int8(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    output = write(tiny_checkpoint(**{**SIZES, "intermediate_size": 72}), tmp_path / "saved", "int4")
    tensors = load_file(output / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    given = json.loads((output / "config.json").read_text())["quantization_config"]
    assert given["format"] == "mixed-precision"
    assert sorted(group["format"] for group in given["config_groups"].values()) == ["int-quantized", "pack-quantized"]


@pytest.mark.parametrize("exit_adapters", [True, False])
def test_other_files_and_exit_adapters_are_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, exit_adapters: bool
) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    if exit_adapters:
        write_tiny_adapters(folder, folder, [1], tokens=range(50))
    for name in ("README.md", "layerskip.json", "old.bin"):
        (folder / name).write_text("text")
    output = write(folder, tmp_path / "saved")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not names & {"layerskip.json", "old.bin"}
    (folder / "layerskip.json").unlink()
    lm = load(str(output), device="cpu")
    assert lm.decoder.adapted_exits == ((1,) if exit_adapters else ())
    assert lm.generate("def f(", max_new_tokens=4)[0].text
    assert oct(output.stat().st_mode & 0o777) == oct(0o777 & ~writing._umask())
    assert oct((output / "model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~writing._umask())


def test_large_models_are_written_in_parts(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    folder = tiny_checkpoint(max_shard_size="40KB", **SIZES)
    output = write(folder, tmp_path / "saved")
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    monkeypatch.undo()
    whole = write(folder, tmp_path / "whole")
    one, other = (open_checkpoint(str(path)).weights for path in (output, whole))
    assert one.names() == other.names()
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.names())


def test_nothing_is_left_of_work_that_failed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert [path.name.startswith(".saved.") for path in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_copy_files", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_checkpoint(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_known_before_is_refused_before(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    checkpoint = Checkpoint.in_folder(folder)
    for bits in (None, "fp8", "int2"):
        with pytest.raises(InvalidArgumentError, match=r"quantize must be int8 or int4 to be saved, got"):
            check_writable(checkpoint, bits, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"full isn't empty; name a folder"):
        check_writable(checkpoint, "int8", tmp_path / "full")
    with pytest.raises(InvalidArgumentError, match=r"file is a file; name a folder"):
        check_writable(checkpoint, "int8", tmp_path / "full" / "file")
    output = write(folder, tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(safetensors \(int-quantized, 8 bits\)\)"):
        check_writable(Checkpoint.in_folder(output), "int8", tmp_path / "new")


def test_a_folder_without_permission(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")  # the superuser may write
    with pytest.raises(InvalidArgumentError, match=r"locked can't be written"):
        check_writable(Checkpoint.in_folder(tiny_checkpoint()), "int8", tmp_path / "locked" / "new")


def test_a_folder_below_a_file(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"file can't be written"):
        check_writable(Checkpoint.in_folder(tiny_checkpoint()), "int8", tmp_path / "file" / "new")


def test_an_empty_folder_is_filled(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    output = write(tiny_checkpoint(), tmp_path / "empty")
    assert (output / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_adapters_of_the_original_are_not_those_of_the_saved(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Their description names the weights that they draft for, so that mixing them up is noticed."""
    folder = tiny_checkpoint()
    write_tiny_adapters(folder, folder, [1])
    output = write(folder, tmp_path / "saved")
    shutil.copy(folder / "exit_adapters.json", output)
    with pytest.raises(InvalidArgumentError, match="whose weights differ"):
        load(str(output), device="cpu")
