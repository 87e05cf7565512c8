"""Numbers of a GGUF file's tensors, in all types; parts of them, of which nothing else is read."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import convert, write_random
from mapped_files import LARGE_PAGE, needs_smaps, resident_bytes

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.gguf.container import read_container
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.checkpoint.gguf.tensors import TYPES, GGUFTensors, block_format, read_blocks, read_tensor
from layerskip.checkpoint.loading.share import ShareSource
from layerskip.checkpoint.loading.tensors import Part
from layerskip.errors import WeightsError
from layerskip.model.parallel.group import RankGroup
from layerskip.model.parallel.share import Membership, shares

Tiny = Callable[..., Path]
KEPT = {name: name.lower() for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")}
KEPT["IQ4_NL"] = "q8_0"


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
def test_numbers_of_all_types(type_: GGMLQuantizationType, tmp_path: Path) -> None:
    """Random blocks, against the gguf package's reading of them."""
    expected = write_random(tmp_path / "model.gguf", type_, 24, 512)
    entry = read_container(tmp_path / "model.gguf").tensors["weight"]
    assert entry.shape == (24, 512)
    assert torch.equal(read_tensor(entry).float(), expected)
    assert block_format(entry) == KEPT.get(type_.name)
    if type_.name in KEPT:
        assert torch.equal(read_blocks(entry).dequantize(), expected)


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
def test_parts_of_all_types(type_: GGMLQuantizationType, tmp_path: Path) -> None:
    """Columns that cut blocks too: the blocks that they touch are read."""
    whole = write_random(tmp_path / "model.gguf", type_, 24, 1024)
    entry = read_container(tmp_path / "model.gguf").tensors["weight"]
    for start, stop in ((0, 24), (0, 1), (23, 24), (5, 14)):
        assert torch.equal(read_tensor(entry, Part.rows(start, stop)).float(), whole[start:stop])
        if type_.name in KEPT:
            assert torch.equal(read_blocks(entry, Part.rows(start, stop)).dequantize(), whole[start:stop])
    for start, stop in ((0, 1024), (256, 768), (512, 1024), (1, 2), (100, 700)):
        assert torch.equal(read_tensor(entry, Part.columns(start, stop)).float(), whole[:, start:stop])
    if type_.name in KEPT:
        start, stop = (96, 544) if GGML_QUANT_SIZES[type_][0] == 32 else (256, 768)
        some = read_blocks(entry, Part.columns(start, stop))
        assert some.shape == (24, stop - start)
        assert torch.equal(some.dequantize(), whole[:, start:stop])


def test_rows_of_blocks_are_put_in_order(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", hidden_size=64)
    file = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q8_0)
    source = open_checkpoint(str(file)).weights
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert torch.equal(GGUFFile(file).weights.blocks(name).dequantize(), source.get(name))


@pytest.fixture(scope="module", params=["F32", "Q8_0", "Q5_0"])
def source(
    tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> GGUFTensors:
    """A Llama with biases, whose queries and keys a file has in another order of rows."""
    folder = tiny_checkpoint("llama", hidden_size=64, attention_bias=True)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return GGUFFile(convert(folder, path, type_=GGMLQuantizationType[request.param])).weights


@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_proj.bias"])
@pytest.mark.parametrize("bounds", [(0, 32), (16, 32), (3, 21), (31, 32)])
def test_parts_in_hugging_face_s_order(source: GGUFTensors, name: str, bounds: tuple[int, int]) -> None:
    name, some = f"model.layers.1.self_attn.{name}", slice(*bounds)
    whole = source.get(name)
    assert torch.equal(source.get(name, Part.rows(*bounds)), whole[some])
    if source.block_format(name) is not None:
        assert torch.equal(source.blocks(name, Part.rows(*bounds)).dequantize(), whole[some])
        assert torch.equal(source.blocks(name, Part.columns(0, 32)).dequantize(), whole[:, :32])
    if name.endswith("weight"):
        assert torch.equal(source.get(name, Part.columns(*bounds)), whole[:, some])


def test_a_rank_has_whole_blocks_or_numbers(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Rows can be cut anywhere, columns between blocks of 256; what would cut blocks is read as numbers."""
    folder = tiny_checkpoint("llama", hidden_size=512, intermediate_size=512)
    file = convert(folder, tmp_path / "model.gguf", type_=GGMLQuantizationType.Q4_K)
    config, whole = open_checkpoint(str(file)).config, GGUFFile(file).weights
    name = "model.layers.0.mlp.down_proj.weight"
    for num_ranks, kept in ((2, "q4_k"), (4, None)):
        sources = [
            ShareSource(whole, Membership(group=cast(RankGroup, None), config=config, share=share, vocabulary=()))
            for share in shares(config, num_ranks)
        ]
        assert {source.block_format(name) for source in sources} == {kept}
        assert torch.equal(torch.cat([source.get(name) for source in sources], 1), whole.get(name))
        if kept is not None:
            assert torch.equal(torch.cat([s.blocks(name).dequantize() for s in sources], 1), whole.get(name))
        rows = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(torch.cat([s.blocks(rows).dequantize() for s in sources]), whole.get(rows))


def test_parts_that_cannot_be_read(source: GGUFTensors) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    for part in (Part.rows(60, 65), Part.columns(0, 65), Part.rows(4, 4)):
        with pytest.raises(WeightsError, match=rf"{name!r} has shape \(64, 64\)"):
            source.get(name, part)
    if source.block_format(name) is not None:
        with pytest.raises(WeightsError, match=r"in blocks of 32 columns, and columns 16 to 63 would cut them"):
            source.blocks(name, Part.columns(16, 64))


@needs_smaps
@pytest.mark.parametrize(("rows", "dim", "pieces"), [(64, 0, 1), (4, 1, 4)], ids=["rows", "columns"])
@pytest.mark.parametrize("type_", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0], ids=lambda type_: type_.name)
def test_only_the_part_is_read(tmp_path: Path, type_: GGMLQuantizationType, rows: int, dim: int, pieces: int) -> None:
    """A sixteenth of a file of 64 MiB; `pieces` is the number of runs of bytes that the part consists of."""
    path, (numbers, num_bytes) = tmp_path / "model.gguf", GGML_QUANT_SIZES[type_]
    blocks = 2**26 // rows // num_bytes
    writer = GGUFWriter(path, "llama")
    stored = torch.ones(rows, blocks * num_bytes, dtype=torch.uint8)
    writer.add_tensor("weight", stored.numpy(), raw_dtype=type_)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    entry = read_container(path).tensors["weight"]
    if dim == 0:
        part, size = Part.rows(30, 30 + rows // 16), stored.numel() // 16
    else:
        part = Part.columns(blocks // 2 * numbers, (blocks // 2 + blocks // 16) * numbers)
        size = rows * (blocks // 16) * num_bytes
    data = read_tensor(entry, part) if type_ == GGMLQuantizationType.F32 else read_blocks(entry, part).data
    assert data.nbytes == size
    assert data.unique().numel() == 1
    assert size <= resident_bytes(path) <= size + (pieces + 1) * 2 * LARGE_PAGE < 2**25
    del data
    assert resident_bytes(path) == 0
