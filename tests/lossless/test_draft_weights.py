"""Drafts by other weights than those that verify: fewer bits, fewer tokens. The text stays the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import cache_of, drain, start
from everywhere import same_everywhere

import layerskip
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
WAYS: list[dict[str, Any]] = [
    {"quantize_draft": "int8"},
    {"quantize_draft": "int4"},
    {"draft_vocabulary": 20},
    {"quantize_draft": "int8", "draft_vocabulary": 20},
]


@pytest.fixture(scope="session", params=["torch", "native"])
def reload(lm_folder: Path, request: pytest.FixtureRequest) -> Callable[..., LanguageModel]:
    """Loads one network with different options."""
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")

    def load(**options: Any) -> LanguageModel:
        if request.param == "torch" and "quantize_draft" in options:
            pytest.importorskip("torchao")
            if options["quantize_draft"] == "int4":
                pytest.skip("torchao's int4 needs CUDA")
        return layerskip.load(str(lm_folder), dtype="float32", device="cpu", kernels=request.param, **options)

    return load


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.2}], ids=["greedy", "coupled", "penalty"])
def test_the_text_stays(
    reload: Callable[..., LanguageModel], prompts: list[list[int]], way: dict[str, Any], options: dict[str, Any]
) -> None:
    assert same_everywhere(reload(**way), reload(), prompts, **options) > 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_cache_holds_what_the_verifier_computed(
    reload: Callable[..., LanguageModel], prompts: list[list[int]], way: dict[str, Any]
) -> None:
    def written(lm: LanguageModel, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        engine = start(lm.decoder, [prompts[1]], max_new_tokens=20, **options)
        cache, length = cache_of(engine), len(prompts[1]) + 19
        drain(engine)
        return cache.keys[:, 0, :length], cache.values[:, 0, :length]

    expected = written(reload(), generation_strategy="autoregressive")
    found = written(reload(**way), exit_layer=2, num_speculations=4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_layers_that_are_entered(reload: Callable[..., LanguageModel], way: dict[str, Any]) -> None:
    """Copies with fewer bits run each draft once, and verification then all layers; other drafts share their layers."""
    lm = reload(**way)
    engine = start(lm.decoder, [[1, 2, 3]], exit_layer=2, num_speculations=4, max_new_tokens=60)
    engine.step()  # reads the prompt
    before = lm.decoder.layer_calls
    engine.step()
    depth = lm.decoder.num_layers
    expected = 4 * 2 + depth if "quantize_draft" in way else 5 * 2 + depth - 2
    assert lm.decoder.layer_calls - before == expected


def test_drafts_keep_to_the_vocabulary(reload: Callable[..., LanguageModel]) -> None:
    lm = reload(draft_vocabulary=10)
    for options in ({}, {**SAMPLED, "acceptance": "rejection"}):
        stream = lm.stream([[1, 2, 3]], show_drafts=True, exit_layer=2, max_new_tokens=40, **options)
        drafts = [token for event in stream if isinstance(event, layerskip.DraftEvent) for token in event.token_ids]
        assert drafts
        assert max(drafts) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int2"}, r"quantize 'int2' is not known; use int8, int4, fp8"),
        ({"quantize_draft": "fp8"}, "fp8' needs a CUDA GPU"),
        ({"draft_vocabulary": 0}, "draft_vocabulary must be from 1 to the vocabulary's 48, got 0"),
        ({"draft_vocabulary": 49}, "got 49"),
        ({"draft_text": "x"}, "give that as well"),
        ({"draft_vocabulary": 4, "draft_text": "/nowhere"}, r"draft_text '/nowhere' can't be read"),
    ],
)
def test_bad_options(reload: Callable[..., LanguageModel], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        reload(**options)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_all_weights_in_fewer_bits(
    reload: Callable[..., LanguageModel], prompts: list[list[int]], quantize: str
) -> None:
    """Another model, about as good; speculation in it is lossless as in any."""
    plain = reload()
    try:
        lm = reload(quantize=quantize)
    except InvalidArgumentError as error:
        pytest.skip(str(error))
    tokens = [token for prompt in prompts for token in prompt]
    error = (lm.logits(tokens) - plain.logits(tokens)).norm() / plain.logits(tokens).norm()
    assert 0 < error < (0.05 if quantize == "int8" else 0.4)
    depth = lm.decoder.num_layers
    assert lm.decoder.weight_bytes(0, depth) < (0.5 if quantize == "int8" else 0.4) * plain.decoder.weight_bytes(
        0, depth
    )
    same_everywhere(lm, lm, prompts)
