"""Products with inputs in 8 bits or in bfloat16: other numbers, and within them the same text however it is decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from everywhere import same_everywhere
from gguf import GGMLQuantizationType
from gguf_files import convert
from tiny import write_agreeing

import layerskip
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}


@pytest.fixture(scope="module", params=[("int8", "int8"), ("int8", "int4"), ("bfloat16", None)], ids=str)
def lm(lm_folder: Path, request: pytest.FixtureRequest) -> LanguageModel:
    compute, quantize = request.param
    return layerskip.load(str(lm_folder), device="cpu", dtype="float32", quantize=quantize, compute=compute)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.2}], ids=["greedy", "coupled", "penalty"])
def test_the_text_stays(lm: LanguageModel, prompts: list[list[int]], options: dict[str, Any]) -> None:
    assert lm.decoder.compute in ("int8", "bfloat16")
    assert same_everywhere(lm, lm, prompts, **options) > 0


def test_batches_and_single_rows_agree(lm: LanguageModel, prompts: list[list[int]]) -> None:
    together = lm.generate(prompts, exit_layer=1, num_speculations=3, max_new_tokens=20)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = lm.generate([prompt], generation_strategy="autoregressive", max_new_tokens=20)
        assert result.token_ids == alone.token_ids


def test_a_token_that_ends_the_text_inside_a_draft(lm: LanguageModel, prompts: list[list[int]]) -> None:
    (free,) = lm.generate(prompts[:1], generation_strategy="autoregressive", max_new_tokens=12)
    end = free.token_ids[5]
    options: dict[str, Any] = {"eos_token_ids": (end,), "max_new_tokens": 12}
    (plain,) = lm.generate(prompts[:1], generation_strategy="autoregressive", **options)
    (ours,) = lm.generate(prompts[:1], exit_layer=2, num_speculations=6, **options)
    assert ours.token_ids == plain.token_ids
    (one,) = lm.generate(prompts[:1], exit_layer=2, num_speculations=6, max_new_tokens=1)
    assert one.token_ids == free.token_ids[:1]


@pytest.mark.parametrize(("compute", "quantize"), [("int8", "int8"), ("bfloat16", None)])
def test_numbers_are_near_those_of_float32(
    lm_folder: Path, prompts: list[list[int]], compute: str, quantize: str | None
) -> None:
    near, exact = (
        layerskip.load(str(lm_folder), device="cpu", quantize=quantize, compute=c)  # type: ignore[arg-type]
        for c in (compute, "float32")
    )
    ours, theirs = near.logits(prompts[0]), exact.logits(prompts[0])
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("compute", ["float32", "int8"])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize(
    ("type_", "others"),
    [
        ("Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}),  # as in llama.cpp's Q4_K_M
        ("Q5_K", {"attn_v": "Q8_0", "ffn_up": "Q5_1"}),
        ("Q5_0", {"attn_k": "Q5_1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_in_several_formats(
    tmp_path: Path, prompts: list[list[int]], type_: str, others: dict[str, str], compute: str, options: dict[str, Any]
) -> None:
    write_agreeing(tmp_path, width=256, inner=512)
    types = {name: GGMLQuantizationType[other] for name, other in others.items()}
    path = convert(tmp_path, tmp_path / "model.gguf", type_=GGMLQuantizationType[type_], types=types)
    lm = layerskip.load(str(path), device="cpu", dtype="float32", compute=compute)
    assert lm.decoder.compute == compute
    assert same_everywhere(lm, lm, prompts, **options) > 0
    together = lm.generate(prompts, exit_layer=1, num_speculations=3, max_new_tokens=20)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = lm.generate([prompt], generation_strategy="autoregressive", max_new_tokens=20)
        assert result.token_ids == alone.token_ids


def test_blocks_of_files(tiny_checkpoint: Callable[..., Path], tmp_path: Path, prompts: list[list[int]]) -> None:
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=96)
    path = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q4_0)
    lm = layerskip.load(str(path), device="cpu", compute="int8")
    assert lm.decoder.compute == "int8"
    assert layerskip.load(str(path), device="cpu").decoder.compute == "float32"
    (plain,) = lm.generate(prompts[:1], generation_strategy="autoregressive", max_new_tokens=20)
    (ours,) = lm.generate(prompts[:1], exit_layer=1, num_speculations=4, max_new_tokens=20)
    assert ours.token_ids == plain.token_ids


def test_weights_in_floats_cannot_be_computed_so(lm_folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="compute 'int8' needs weights in 8 or 4 bits"):
        layerskip.load(str(lm_folder), device="cpu", compute="int8")


def test_weights_in_few_bits_cannot_be_computed_in_bfloat16(lm_folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="compute 'bfloat16' needs weights in floats"):
        layerskip.load(str(lm_folder), device="cpu", quantize="int8", compute="bfloat16")
