"""Tensors of safetensors files, whole and in part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mapped_files import LARGE_PAGE, needs_smaps, resident_bytes
from safetensors.torch import save_file

from layerskip.checkpoint.loading.tensors import Part
from layerskip.checkpoint.safetensors import SafetensorsFiles, find_weight_files
from layerskip.errors import WeightsError

Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(tiny_checkpoint: Callable[..., Path], request: pytest.FixtureRequest) -> SafetensorsFiles:
    return SafetensorsFiles(find_weight_files(tiny_checkpoint(dtype=request.param)))


@pytest.mark.parametrize("bounds", [(0, 1), (0, 32), (5, 18), (31, 32)])
def test_a_part_is_that_of_the_whole(source: SafetensorsFiles, bounds: tuple[int, int]) -> None:
    some, whole = slice(*bounds), source.get(Q_PROJ)
    assert whole.shape == (32, 32)
    assert torch.equal(source.get(Q_PROJ, Part.rows(*bounds)), whole[some])
    assert torch.equal(source.get(Q_PROJ, Part.columns(*bounds)), whole[:, some])
    assert torch.equal(source.get(NORM, Part.rows(*bounds)), source.get(NORM)[some])


@pytest.mark.parametrize("part", [Part.rows(0, 33), Part.rows(-1, 2), Part.columns(4, 4), Part.columns(32, 40)])
def test_parts_that_the_tensor_does_not_have(source: SafetensorsFiles, part: Part) -> None:
    with pytest.raises(WeightsError, match=rf"{Q_PROJ!r} has shape \(32, 32\), and (rows|columns) {part.start} to"):
        source.get(Q_PROJ, part)


def test_a_vector_has_no_columns(source: SafetensorsFiles) -> None:
    with pytest.raises(WeightsError, match=r"has shape \(32,\), and columns 0 to 3 were asked for"):
        source.get(NORM, Part.columns(0, 4))


@needs_smaps
@pytest.mark.parametrize(
    ("shape", "part", "pieces"),
    [((64, 2**18), Part.rows(30, 34), 1), ((4, 2**22), Part.columns(2**21, 2**21 + 2**18), 4)],
    ids=["rows", "columns"],
)
def test_only_the_part_is_read(tmp_path: Path, shape: tuple[int, int], part: Part, pieces: int) -> None:
    """Of a file of 64 MiB; `pieces` is the number of runs of bytes that the part consists of."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(shape)}, path)
    tensor = SafetensorsFiles({"": path}).get("weight", part)
    assert tensor.sum() == tensor.numel()
    assert tensor.nbytes <= resident_bytes(path) <= tensor.nbytes + (pieces + 1) * 2 * LARGE_PAGE < 2**25
    del tensor
    assert resident_bytes(path) == 0
    whole = SafetensorsFiles({"": path}).get("weight")
    assert whole.sum() == whole.numel()
    assert resident_bytes(path) >= 2**26, "the measurement must see what is read"
