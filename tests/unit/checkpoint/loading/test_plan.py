"""What is planned for a checkpoint, by the options and the machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import convert

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.loading import placement
from layerskip.checkpoint.loading import plan as plan_module
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.plan import DraftWeights, LoadingPlan, plan_loading
from layerskip.errors import InvalidArgumentError, OutOfMemoryError, WeightsError
from layerskip.model.native.library import load_library

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NATIVE = load_library() is not None
PLAIN = LoadingPlan(device=CPU, dtype=torch.float32, context=128, network="native" if NATIVE else "torch")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.in_folder(tiny_checkpoint(dtype="bfloat16"))


def plan(checkpoint: Checkpoint, **options: Any) -> LoadingPlan:
    return plan_loading(checkpoint, LoadingConfig(**{"device": "cpu", **options}))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16, "network": "torch"}),
        ({"kernels": "torch"}, {"network": "torch"}),
        ({"max_context": 7}, {"context": 7}),
        ({"draft_vocabulary": 3}, {"draft": DraftWeights(tokens=(0, 1, 2))}),
    ],
)
def test_plans_on_a_cpu(checkpoint: Checkpoint, options: dict[str, Any], changes: dict[str, Any]) -> None:
    assert plan(checkpoint, **options) == replace(PLAIN, **changes), plan(checkpoint, **options)


@pytest.mark.skipif(not NATIVE, reason="the compiled kernels weren't built")
def test_plans_with_fewer_bits(checkpoint: Checkpoint) -> None:
    assert plan(checkpoint, quantize="int8") == replace(PLAIN, quantize="int8")
    draft = DraftWeights(quantize="int4", tokens=(0, 1))
    assert plan(checkpoint, quantize_draft="int4", draft_vocabulary=2) == replace(PLAIN, draft=draft)
    assert PLAIN.keeps_blocks
    assert not plan(checkpoint, quantize="int8").keeps_blocks


@pytest.mark.skipif(placement.why_not_compile(CPU) is not None, reason="there is no compiler")
def test_compiled_rounds_take_a_network_of_torch(checkpoint: Checkpoint) -> None:
    assert plan(checkpoint, compile="max") == replace(PLAIN, network="torch", rounds="max")


def test_rounds_with_experts_are_not_compiled(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint("mixtral"))
    with pytest.raises(InvalidArgumentError, match="which of the model's experts run depends on the tokens; use auto"):
        plan(checkpoint, compile="max")
    monkeypatch.setattr(plan_module, "choose_device", lambda device, local_rank: CUDA)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: None)
    assert plan(checkpoint, device="auto").rounds is None


@pytest.mark.parametrize(("compile", "rounds"), [("auto", "graphs"), ("off", None)])
def test_plans_on_a_gpu(checkpoint: Checkpoint, compile: str, rounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned only, so that no GPU is needed."""
    monkeypatch.setattr(plan_module, "choose_device", lambda device, local_rank: CUDA)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: None)
    assert plan(checkpoint, device="auto", compile=compile) == LoadingPlan(
        device=CUDA,
        dtype=torch.bfloat16,
        context=128,
        network="torch",
        rounds=rounds,  # type: ignore[arg-type]
    )


def test_the_most_frequent_tokens_of_a_text(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint(tokenizer=True, eos_token_id=5))
    (tmp_path / "text.txt").write_text("return return return self")
    ids = checkpoint.tokenizer("return return return self", add_special_tokens=False)["input_ids"]
    draft = plan(checkpoint, draft_vocabulary=3, draft_text=tmp_path / "text.txt").draft
    assert draft is not None
    assert draft.tokens is not None
    assert len(draft.tokens) == 3
    assert {5, max(set(ids), key=ids.count)} <= set(draft.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_text": "text.txt"}, "give that as well"),
        ({"draft_vocabulary": 0}, "draft_vocabulary must be from 1 to the vocabulary's 96, got 0"),
        ({"draft_vocabulary": 2, "draft_text": "no such file"}, "draft_text 'no such file' can't be read"),
        ({"kernels": "native", "dtype": "float16"}, "kernels 'native' can't run this model"),
        ({"compute": "float16"}, "compute 'float16' is not known; use float32, int8, bfloat16"),
        ({"compute": "bfloat16", "kernels": "torch"}, "compute 'bfloat16' needs native kernels"),
        ({"compute": "int8", "kernels": "torch"}, "compute 'int8' needs native kernels"),
        ({"cache_dtype": "int4"}, "cache_dtype 'int4' is not known; use auto, float32, bfloat16, int8"),
        ({"quantize": "int2"}, "quantize 'int2' is not known; use int8, int4, fp8"),
    ],
)
def test_plans_that_cannot_be_made(checkpoint: Checkpoint, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        plan(checkpoint, **options)


def test_memory_is_compared_with_what_the_plan_takes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are counted as the file has them where they are kept so, and as floats where they aren't."""
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=96)
    path = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q4_0)
    checkpoint = open_checkpoint(str(path))
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 2 * path.stat().st_size)
    with pytest.raises(OutOfMemoryError, match="free on cpu"):
        plan(checkpoint, kernels="torch")
    if NATIVE:
        assert plan(checkpoint).network == "native"


def test_tensors_are_checked_before_anything_else(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    text = (folder / "config.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path, "read_text", lambda *_, **__: text.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
        )
        with pytest.raises(WeightsError, match="incomplete"):
            plan(Checkpoint.in_folder(folder), dtype="nonsense")
