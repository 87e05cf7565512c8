"""Every family: self-speculative decoding gives the autoregressive tokens, and compiled results don't depend on blocks.

Shapes: B rows, Q tokens, D width.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.config.families import FAMILIES
from layerskip.model.native.library import load_library

PROMPTS = [[5, 9, 11, 40], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
TEXT = [(5 * i * i + 3) % 96 for i in range(70)]
"""More tokens than go through the layers together."""


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A checkpoint of each family."""
    return {family: tiny_checkpoint(family) for family in FAMILIES}


@pytest.fixture(scope="module", params=[(family, kernels) for family in FAMILIES for kernels in ("torch", "native")])
def lm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    family, kernels = request.param
    return load(folders[family], kernels)


def test_every_exit_and_draft_length(lm: LanguageModel) -> None:
    def texts(**options: Any) -> list[list[int]]:
        results = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, **options)
        return [result.token_ids for result in results]

    expected = texts(generation_strategy="autoregressive", temperature=0)
    drawn = texts(generation_strategy="autoregressive", temperature=0.9, seed=3)
    assert drawn != expected
    for exit_layer in range(1, lm.decoder.num_layers + 1):
        for num_speculations in (1, 2, 5):
            options = {"exit_layer": exit_layer, "num_speculations": num_speculations}
            assert texts(temperature=0, **options) == expected, options
        options = {"exit_layer": exit_layer, "num_speculations": 3, "acceptance": "coupled"}
        assert texts(temperature=0.9, seed=3, **options) == drawn, options


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_results_are_the_same_in_any_block(folders: dict[str, Path], family: str) -> None:
    """To the last bit, whatever tokens and rows are computed beside a token."""
    lm = load(folders[family], "native")
    whole = run(lm, [TEXT], len(TEXT))
    assert torch.equal(run(lm, [TEXT], 1), whole)
    assert torch.equal(run(lm, [TEXT], 7), whole)
    beside = run(lm, [TEXT[::-1], TEXT, [1] * len(TEXT)], 35)
    assert torch.equal(beside[1:2], whole)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_experts_that_no_token_chooses_are_not_touched(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kernels: str
) -> None:
    """The router's rows are r, 0.1 r, -r and -0.1 r: the second and the fourth expert are never the best."""
    folder = tiny_checkpoint("mixtral", num_experts_per_tok=1)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor.copy_(tensor[:1] * torch.tensor([1.0, 0.1, -1.0, -0.1]).unsqueeze(1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, tensor in tensors.items():
        if ".experts.1." in name or ".experts.3." in name:
            tensor.fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    whole, damaged = load(folder, kernels), load(tmp_path, kernels)
    assert torch.equal(whole.logits(TEXT), damaged.logits(TEXT))
    assert texts(damaged, exit_layer=2, num_speculations=3) == texts(whole, generation_strategy="autoregressive")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"quantize": "int8", "compute": "int8"}, {"quantize_draft": "int4"}], ids=str
)
def test_experts_in_fewer_bits(folders: dict[str, Path], family: str, options: dict[str, Any]) -> None:
    """Fewer bits give another model, whose text is the same however it is decoded; a drafter's bits change nothing."""
    plain = load(folders[family], "native")
    lm = layerskip.load(str(folders[family]), dtype="float32", device="cpu", kernels="native", **options)
    expected = texts(lm, generation_strategy="autoregressive")
    assert texts(lm, exit_layer=2, num_speculations=3) == expected
    error = float((lm.logits(TEXT) - plain.logits(TEXT)).abs().median())
    assert error == 0 if "quantize_draft" in options else 0 < error < 0.1


def texts(lm: LanguageModel, **options: Any) -> list[list[int]]:
    results = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, temperature=0, **options)
    return [result.token_ids for result in results]


def load(folder: Path, kernels: str) -> LanguageModel:
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return layerskip.load(str(folder), dtype="float32", device="cpu", kernels=kernels)


def run(lm: LanguageModel, texts: list[list[int]], size: int) -> Tensor:
    """[B, Q, D], outputs of the last layer, computed `size` tokens of each row at a time."""
    decoder, cache = lm.decoder, lm.decoder.new_cache(len(texts), len(texts[0]))
    parts = []
    for start in range(0, len(texts[0]), size):
        block = torch.tensor([text[start : start + size] for text in texts])
        positions = decoder.place(cache, [start] * len(texts), block.shape[1])
        parts.append(decoder.run_layers(decoder.embed(block), positions, cache, 0, decoder.num_layers))
        for row in range(len(texts)):
            cache.commit(row, block.shape[1])
    return torch.cat(parts, 1)
