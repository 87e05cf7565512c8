"""Layers that stay in the CPU's memory: the same text, in two buffers, copied as often as is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from offloading import size_for

from layerskip import LanguageModel, load
from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import device_bytes, run_bytes
from layerskip.checkpoint.loading.memory.running import CHUNK
from layerskip.checkpoint.loading.memory.weights import HOST_PART, weights_of
from layerskip.checkpoint.loading.plan import choose_plan
from layerskip.decoding.rounds.plain import PREFILL_CHUNK
from layerskip.errors import InvalidArgumentError, OutOfMemoryError
from layerskip.model.torch.offload import OffloadedLayers

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_hidden_layers": 6}
PROMPT = [list(range(3, 40))]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(**SIZES)


def offloaded(lm: LanguageModel) -> OffloadedLayers:
    layers: Any = lm.decoder._network.layers  # type: ignore[attr-defined]
    assert isinstance(layers, OffloadedLayers)
    return layers


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_texts_are_those_of_a_model_that_is_on_the_device(
    tiny_checkpoint: Callable[..., Path], layers: int, model_type: str
) -> None:
    folder = tiny_checkpoint(model_type, **SIZES)
    whole = load(str(folder), device="cpu", kernels="torch")
    part = load(str(folder), device="cpu", device_memory=size_for(folder, layers))
    assert len(offloaded(part)._offloaded) == 6 - layers
    ways: list[dict[str, Any]] = [
        {},
        {"exit_layer": 2, "num_speculations": 3},
        {"exit_layer": 5, "num_speculations": 2},
    ]
    for way in ways:
        texts = [lm.generate(PROMPT, max_new_tokens=20, **way)[0].token_ids for lm in (whole, part)]
        assert texts[0] == texts[1]


def test_exit_adapters_are_on_the_device(folder: Path, tmp_path: Path) -> None:
    adapters = write_tiny_adapters(tmp_path / "adapters", folder, [2])
    lm = load(str(folder), device="cpu", device_memory=size_for(folder, 3), exit_adapters=adapters)
    plain = load(str(folder), device="cpu", kernels="torch").generate(PROMPT, max_new_tokens=16)[0]
    result = lm.generate(PROMPT, max_new_tokens=16, exit_layer=2, num_speculations=3)[0]
    assert result.token_ids == plain.token_ids
    assert result.stats.drafted > 0


def test_a_pass_copies_each_layer_once_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(str(folder), device="cpu", device_memory=size_for(folder, 2))
    layers = offloaded(lm)
    assert "4 of 6 layers stay in the CPU's memory" in caplog.text
    assert layers.num_bytes == sum(layer.num_bytes for layer in layers[2:6])
    assert 0 < layers.seconds() < 10
    copied: list[int] = []
    fill = OffloadedLayers._fill
    monkeypatch.setattr(
        OffloadedLayers, "_fill", lambda self, index, slot: (copied.append(index), fill(self, index, slot))
    )
    cache = lm.decoder.new_cache(1, 8)
    hidden = lm.decoder.embed(torch.tensor([[1, 2]]))
    layers._held = [None, None]
    lm.decoder.run_layers(hidden, lm.decoder.place(cache, [0], 2), cache, 0, 6)
    assert copied == [2, 3, 4, 5]
    lm.decoder.run_layers(hidden, lm.decoder.place(cache, [0], 2), cache, 0, 2)
    assert copied == [2, 3, 4, 5]  # drafting with layers that are on the device copies nothing


def test_planned_memory_of_the_device_stays_below_the_limit(folder: Path) -> None:
    checkpoint = Checkpoint.in_folder(folder)
    for layers in range(4):
        size = size_for(folder, layers)
        plan = choose_plan(checkpoint, LoadingConfig(device="cpu", device_memory=size))
        assert (plan.network, plan.rounds, plan.resident_layers) == ("torch", None, layers)
        weights = weights_of(checkpoint.network_config, checkpoint.weights, plan)
        assert device_bytes(weights) + run_bytes(checkpoint.network_config, plan) <= int(size)
        assert sum(weight.kept for weight in weights if weight.part == HOST_PART) > 0


def test_a_model_that_fits_is_loaded_as_ever(folder: Path) -> None:
    plan = choose_plan(Checkpoint.in_folder(folder), LoadingConfig(device="cpu", device_memory="1 GiB"))
    assert (plan.network, plan.resident_layers) == ("torch", None)


def test_a_chunk_is_what_prompts_are_read_in() -> None:
    assert CHUNK == PREFILL_CHUNK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "native"}, "kernels 'native' needs them in another form"),
        ({"compile": "max"}, "compile 'max' needs them"),
        ({"quantize": "int8"}, "quantize 'int8' needs them"),
        ({"quantize_draft": "int8"}, "quantize_draft 'int8' needs them"),
        ({"device_memory": "much"}, "device_memory must be a size such as 20GiB or 512MiB, got 'much'"),
        ({"device_memory": "0"}, "device_memory must be more than nothing"),
        ({"device_memory": 5}, "device_memory must be a text such as '20GiB', got 5"),
    ],
)
def test_what_does_not_go_together(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load(str(folder), device="cpu", **{"device_memory": "1GiB", **options})


def test_a_limit_below_what_must_be_on_the_device(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"is too little for .*: without any layer"):
        load(str(folder), device="cpu", device_memory="1kB")
