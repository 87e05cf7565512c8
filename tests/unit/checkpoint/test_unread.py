"""Checkpoints of which only headers are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import write_tiny_adapters
from gguf import GGMLQuantizationType
from gguf_files import convert

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.gguf.tensors import GGUFTensors
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import plan_memory
from layerskip.checkpoint.loading.plan import choose_plan
from layerskip.checkpoint.safetensors import SafetensorsFiles
from layerskip.checkpoint.unread import UnreadCheckpoint


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor fails."""

    def get(*_: object) -> None:
        raise AssertionError("a tensor was read")

    for kind in (SafetensorsFiles, GGUFTensors):
        monkeypatch.setattr(kind, "get", get)
        monkeypatch.setattr(kind, "blocks", get)


def plan_unread(checkpoint: Checkpoint) -> int:
    unread = UnreadCheckpoint(checkpoint)
    plan = choose_plan(unread, LoadingConfig(device="cpu"))
    return plan_memory(unread.network_config, unread.weights, plan, chunk=8).weights


def test_planning_reads_no_tensor_of_safetensors(
    tiny_checkpoint: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    folder = tiny_checkpoint(seed=5)
    request.getfixturevalue("no_reading")
    assert plan_unread(Checkpoint.in_folder(folder)) > 0


def test_adapters_are_planned_unread(tiny_checkpoint: Callable[..., Path], request: pytest.FixtureRequest) -> None:
    folder = tiny_checkpoint(seed=6)
    plain = plan_unread(Checkpoint.in_folder(folder))
    write_tiny_adapters(folder, folder, [1])
    request.getfixturevalue("no_reading")
    assert plan_unread(Checkpoint.in_folder(folder)) > plain


def test_planning_reads_no_tensor_of_gguf(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = convert(tiny_checkpoint(), tmp_path / "model.gguf", type_=GGMLQuantizationType.Q8_0)
    request.getfixturevalue("no_reading")
    assert plan_unread(open_checkpoint(str(file))) > 0


def test_a_head_of_its_own_is_taken_to_differ(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=False)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    checkpoint = Checkpoint.in_folder(folder)
    assert checkpoint.config.tie_word_embeddings
    assert not UnreadCheckpoint(checkpoint).network_config.tie_word_embeddings
