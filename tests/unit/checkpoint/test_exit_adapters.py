"""Exit adapters on disk: found where they lie, and refused where they don't belong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from safetensors.torch import load_file, save_file
from tiny import write_tiny

import layerskip
from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, WEIGHTS_FILE, read_adapters
from layerskip.errors import CheckpointError, InvalidArgumentError, WeightsError

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(model: Path, **options: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(model), dtype="float32", device="cpu", **options)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    edit(content)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content))


def test_adapters_beside_the_model_are_found(model: Path) -> None:
    write_tiny_adapters(model, model, [1, 2])
    assert load(model).decoder.adapted_exits == (1, 2)
    assert load(model, exit_adapters=None).decoder.adapted_exits == ()


def test_transformers_ignores_them(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    write_tiny_adapters(model, model, [1])
    after = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_elsewhere_fit_a_model_that_was_moved_and_renamed(model: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [2])
    options = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": 20}
    expected = load(model, exit_adapters=adapters).generate([PROMPT], **options)[0]
    shutil.move(model, tmp_path / "renamed")
    shutil.move(adapters, tmp_path / "moved")
    found = load(tmp_path / "renamed", exit_adapters=tmp_path / "moved").generate([PROMPT], **options)[0]
    assert found.token_ids == expected.token_ids
    assert found.stats.accepted == expected.stats.accepted


def test_the_same_weights_in_another_dtype_are_the_same_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "half", dtype="bfloat16")
    adapters = write_tiny_adapters(tmp_path / "adapters", tmp_path / "half", [1])
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    shutil.copytree(tmp_path / "half", tmp_path / "single")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "single" / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path / "single", exit_adapters=adapters).decoder.adapted_exits == (1,)


@pytest.mark.parametrize("where", ["beside", "elsewhere"])
def test_adapters_of_other_weights_are_refused(model: Path, tmp_path: Path, where: str) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1])
    write_tiny(tmp_path / "other", seed=1)
    options: dict[str, Any] = {"exit_adapters": adapters}
    if where == "beside":
        shutil.copytree(adapters, tmp_path / "other", dirs_exist_ok=True)
        options = {}
    with pytest.raises(InvalidArgumentError, match="were trained for tiny, whose weights differ"):
        load(tmp_path / "other", **options)


def test_adapters_of_another_shape_are_refused(model: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1])
    write_tiny(tmp_path / "wide", vocab_size=128)
    with pytest.raises(InvalidArgumentError, match=r"vocab_size 96, and .* has 128"):
        load(tmp_path / "wide", exit_adapters=adapters)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(format=3), "has format 3, and this version reads up to 2"),
        (lambda content: content["adapters"].append(content["adapters"][0]), "two adapters for exit 1"),
        (lambda content: content.update(adapters=[]), "names no adapter"),
        (lambda content: content.pop("base"), "isn't what layerskip train writes"),
        (lambda content: content["adapters"][0].update(depth=3), "isn't what layerskip train writes"),
        (lambda content: content["adapters"][0].update(exit_layer="1"), "exit_layer must be a whole number"),
        (lambda content: content["adapters"][0].update(exit_layer=-1), "exit_layer must be a whole number"),
        (lambda content: content["adapters"][0].update(exit_layer=4), "adapters are for exits 1 to 3"),
    ],
)
def test_a_description_that_is_wrong(model: Path, tmp_path: Path, edit: Any, message: str) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1])
    change(adapters, edit)
    with pytest.raises((CheckpointError, InvalidArgumentError), match=message):
        load(model, exit_adapters=adapters)


def test_a_folder_without_adapters(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no exit adapters"):
        load(model, exit_adapters=tmp_path)


def test_weights_that_are_missing(model: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1])
    (adapters / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="copy both"):
        load(model, exit_adapters=adapters)


@pytest.mark.parametrize("tokens", [[5, 200], [-1, 4]])
def test_tokens_outside_the_vocabulary(model: Path, tmp_path: Path, tokens: list[int]) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", model, [1], tokens=tokens)
    with pytest.raises(WeightsError, match="must hold 2 ids from 0 to 95"):
        load(model, exit_adapters=adapters)


def test_a_vocabulary_without_the_end_of_a_text_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", eos_token_id=7)
    adapters = write_tiny_adapters(tmp_path / "adapters", tmp_path / "model", [1], tokens=[1, 2, 3])
    with pytest.raises(InvalidArgumentError, match="none of them ends a text"):
        load(tmp_path / "model", exit_adapters=adapters)
    adapters = write_tiny_adapters(tmp_path / "more", tmp_path / "model", [1], tokens=[1, 2, 7])
    assert load(tmp_path / "model", exit_adapters=adapters).decoder.adapted_exits == (1,)


def test_what_is_written_is_read(model: Path, tmp_path: Path) -> None:
    adapters = read_adapters(write_tiny_adapters(tmp_path / "adapters", model, [1, 3], tokens=range(40)))
    assert [adapter.exit_layer for adapter in adapters.adapters] == [1, 3]
    assert [adapter.vocabulary_size for adapter in adapters.adapters] == [40, 40]
    assert adapters.base.num_layers == 4


def test_options_of_kinds_that_name_no_folder(model: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="exit_adapters must be 'auto', the path of a folder or None"):
        load(model, exit_adapters=4)
