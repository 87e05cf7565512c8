"""Files with fused experts are read as files with single ones are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensor_sources import Tensors, make_source
from tiny import write_tiny

import layerskip
from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.experts import UnfusedExperts, with_single_experts
from layerskip.checkpoint.loading.tensors import Part, check_names, tensor_shapes
from layerskip.errors import WeightsError
from layerskip.model.native.library import load_library

FAMILIES = ["mixtral", "qwen3_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model, with its experts stored one by one and fused."""
    folders = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("fused")
    for folder, fused in zip(folders, (False, True), strict=True):
        write_tiny(folder, request.param, fused_experts=fused)
    return folders


def test_names_and_tensors_are_the_same(both: tuple[Path, Path]) -> None:
    single, fused = (Checkpoint.in_folder(folder) for folder in both)
    assert not isinstance(single.weights, UnfusedExperts)
    assert isinstance(fused.weights, UnfusedExperts)
    assert fused.weights.names() == single.weights.names() == frozenset(tensor_shapes(single.config))
    for name in single.weights.names():
        whole = single.weights.get(name)
        assert torch.equal(fused.weights.get(name), whole)
        assert torch.equal(fused.weights.get(name, Part.rows(1, 4)), whole[1:4])
        if whole.dim() == 2:
            assert torch.equal(fused.weights.get(name, Part.columns(2, 9)), whole[:, 2:9])
            with pytest.raises(WeightsError, match="rows 1 to 4999 were asked for"):
                fused.weights.get(name, Part.rows(1, 5000))


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_logits_are_the_same(both: tuple[Path, Path], kernels: str) -> None:
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    single, fused = (layerskip.load(str(folder), kernels=kernels).logits([5, 3, 80, 7]) for folder in both)
    assert torch.equal(single, fused)


def test_a_checkpoint_without_experts_is_left_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.in_folder(tiny_checkpoint())
    assert checkpoint.weights is checkpoint.files.weights


@pytest.mark.parametrize(
    ("shape", "message"), [((7, 24, 32), "config.json asks for 8 experts"), ((8, 25, 32), "25 rows")]
)
def test_fused_experts_of_another_shape(shape: tuple[int, ...], message: str) -> None:
    config, _ = make_source("mixtral")
    prefix = "model.layers.0.mlp.experts."
    source = Tensors({f"{prefix}gate_up_proj": torch.zeros(shape), f"{prefix}down_proj": torch.zeros(8, 32, 12)})
    with pytest.raises(WeightsError, match=message):
        with_single_experts(source, config).get("model.layers.0.block_sparse_moe.experts.1.w1.weight")


def test_a_layer_that_lacks_one_of_its_tensors(both: tuple[Path, Path]) -> None:
    fused = Checkpoint.in_folder(both[1])
    source = Tensors({name: torch.zeros(1) for name in fused.files.weights.names() if not name.endswith("down_proj")})
    with pytest.raises(WeightsError, match="lacks"):
        check_names(fused.config, with_single_experts(source, fused.config).names())
