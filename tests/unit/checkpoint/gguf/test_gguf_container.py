"""Files that are damaged, of another kind, or made up: one line each, and nothing large is made on their word."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import convert

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.gguf.config import ARCHITECTURES
from layerskip.checkpoint.gguf.container import Container, TensorEntry, read_container
from layerskip.checkpoint.gguf.tensors import split_experts
from layerskip.checkpoint.loading.tensors import check_names
from layerskip.errors import CheckpointError, LayerSkipError, UnsupportedModelError, WeightsError

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def content(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small but whole file."""
    metadata = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(96)], "general.alignment": 32}
    return convert(tiny_checkpoint(), tmp_path_factory.mktemp("gguf") / "model.gguf", metadata=metadata).read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Loads a file that must be refused; returns what was said."""

    def load(content: bytes, error: type[LayerSkipError] = CheckpointError) -> str:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with pytest.raises(error) as raised:
            _ = open_checkpoint(str(path)).config, open_checkpoint(str(path)).weights
        message = str(raised.value)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 600
        return message

    return load


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    """Content with the first occurrence of some bytes replaced."""
    assert old in content
    return content.replace(old, new, 1)


def key(name: str) -> bytes:
    """How a key's or tensor's name stands in a file."""
    return struct.pack("<Q", len(name)) + name.encode()


def test_what_is_no_gguf_file(refused: Callable[..., str], content: bytes) -> None:
    assert "empty" in refused(b"")
    assert "not a GGUF file" in refused(b"PK\x03\x04" + content[4:])
    assert "cut short" in refused(content[:3])


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (b"\x01\0\0\0", "version 1; versions 2 and 3"),
        (b"\x04\0\0\0", "version 4; versions 2 and 3"),
        (b"\0\0\0\x03", "big-endian"),
    ],
)
def test_other_versions(refused: Callable[..., str], content: bytes, version: bytes, said: str) -> None:
    assert said in refused(content[:4] + version + content[8:])


def test_version_2_is_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content[:4] + b"\x02\0\0\0" + content[8:])
    assert open_checkpoint(str(tmp_path / "model.gguf")).config.num_layers == 4


def test_files_that_were_cut_short(refused: Callable[..., str], content: bytes) -> None:
    for length in [*range(4, 2000, 97), *range(2000, len(content) - 1, 4999), len(content) - 32]:
        assert "cut short" in refused(content[:length])


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**12])
@pytest.mark.parametrize("place", ["tensors", "keys", "name", "list", "text"])
def test_counts_beyond_the_file(refused: Callable[..., str], content: bytes, place: str, count: int) -> None:
    tokens = content.index(key("tokenizer.ggml.tokens")) + len(key("tokenizer.ggml.tokens"))
    offset = {"tensors": 8, "keys": 16, "name": 24, "list": tokens + 8, "text": tokens + 16}[place]
    tracemalloc.start()
    refused(content[:offset] + struct.pack("<Q", count) + content[offset + 8 :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(content)


def test_tensors_outside_the_file_or_over_one_another(refused: Callable[..., str], content: bytes) -> None:
    place = content.index(key("output_norm.weight")) + len(key("output_norm.weight")) + 4 + 8 + 4
    assert "ends at byte" in refused(content[:place] + struct.pack("<Q", 2**40) + content[place + 8 :], WeightsError)
    assert "aligned" in refused(content[:place] + struct.pack("<Q", 33) + content[place + 8 :], WeightsError)
    first = struct.pack("<Q", 0)
    assert "overlap" in refused(content[:place] + first + content[place + 8 :], WeightsError)


def test_shapes_that_cannot_be(refused: Callable[..., str], content: bytes) -> None:
    place = content.index(key("output_norm.weight")) + len(key("output_norm.weight"))
    for dimensions in (0, 5, 2**31):
        assert "dimensions" in refused(
            content[:place] + struct.pack("<I", dimensions) + content[place + 4 :], WeightsError
        )
    for length in (0, 2**63, 2**64 - 1):
        refused(content[: place + 4] + struct.pack("<Q", length) + content[place + 12 :], WeightsError)


def test_types_that_cannot_be_read(refused: Callable[..., str], content: bytes) -> None:
    place = content.index(key("output_norm.weight")) + len(key("output_norm.weight")) + 12
    unknown = content[:place] + struct.pack("<I", 4000) + content[place + 4 :]
    assert "type 4000" in refused(unknown, WeightsError)
    other = content[:place] + struct.pack("<I", GGMLQuantizationType.I32) + content[place + 4 :]
    assert "type I32, which can't be read" in refused(other, WeightsError)


def test_tensors_and_keys_that_are_there_twice(refused: Callable[..., str], content: bytes) -> None:
    twice = replaced(content, key("blk.1.attn_k.weight"), key("blk.1.attn_q.weight"))
    assert "'blk.1.attn_q.weight' twice" in refused(twice, WeightsError)
    twice = replaced(content, key("llama.context_length"), key("general.architecture"))
    assert "'general.architecture' twice" in refused(twice)


def test_tensors_that_the_model_does_not_use(refused: Callable[..., str], content: bytes) -> None:
    other = replaced(content, key("blk.1.attn_k.weight"), key("blk.1.attn_x.weight"))
    assert "'blk.1.attn_x.weight'" in refused(other, WeightsError)


def test_another_architecture(refused: Callable[..., str], content: bytes) -> None:
    said = refused(replaced(content, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba"))
    assert f"'mamba', which is not supported; supported: {', '.join(sorted(ARCHITECTURES))}" in said


def test_experts_that_the_tensors_do_not_have(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    dense = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    file = convert(tiny_checkpoint(), tmp_path / "model.gguf", metadata=dense)
    with pytest.raises(WeightsError, match=r"'blk\.0\.ffn_down\.weight', which a 'mixtral' model|lacks"):
        check_names(open_checkpoint(str(file)).config, open_checkpoint(str(file)).weights.names())
    name = "blk.0.ffn_up_exps.weight"
    entry = TensorEntry(
        path=file, name=name, type=GGMLQuantizationType.F32, shape=(3, 4, 2), offset=0, num_bytes=3 * 4 * 2 * 4
    )
    assert [part.offset for part in split_experts(entry, 3)] == [0, 32, 64]
    with pytest.raises(WeightsError, match="it should be matrices of 8 experts"):
        split_experts(entry, 8)


@pytest.mark.parametrize(
    ("model_type", "key", "value", "said"),
    [
        ("llama", "llama.residual_scale", 0.5, r"sets llama\.residual_scale, which is not supported for 'llama'"),
        ("qwen3", "qwen3.attention.scale", 0.5, r"sets qwen3\.attention\.scale"),
        ("smollm3", "smollm3.logit_scale", 8.0, r"sets smollm3\.logit_scale"),
        ("olmo2", "olmo2.attention.sliding_window", 4096, "is an OLMo 3"),
        ("granite", "granite.rope.scaling.finetuned", False, "has no rotary embedding"),
        ("qwen2", "qwen2.expert_count", 8, r"sets qwen2\.expert_count"),
        ("mixtral", "llama.expert_shared_count", 1, r"sets llama\.expert_shared_count"),
        ("mixtral", "llama.expert_gating_func", 2, "another function than softmax"),
    ],
)
def test_features_of_other_architectures(
    tiny_checkpoint: Tiny, tmp_path: Path, model_type: str, key: str, value: Any, said: str
) -> None:
    file = convert(tiny_checkpoint(model_type), tmp_path / "model.gguf", metadata={key: value})
    with pytest.raises(UnsupportedModelError, match=said):
        _ = open_checkpoint(str(file)).config


def test_a_vocabulary_that_does_not_fit_the_embedding(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    file = convert(tiny_checkpoint(), tmp_path / "model.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(CheckpointError, match="vocabulary of 2 tokens and an embedding table of 96 rows"):
        _ = open_checkpoint(str(file)).config


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_count", 2**31, "layers by its metadata"),
        ("block_count", 0, "positive whole number"),
        ("attention.head_count", 0, "positive whole number"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "positive number"),
        ("attention.layer_norm_rms_epsilon", float("inf"), "positive number"),
        ("rope.freq_base", -1.0, "positive number"),
        ("rope.scaling.type", "dynamic", "'dynamic', which is not supported"),
    ],
)
def test_numbers_that_make_no_sense(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, said: str
) -> None:
    file = convert(tiny_checkpoint(), tmp_path / "model.gguf")
    container = read_container(file)
    changed = Container(
        path=file,
        version=3,
        num_bytes=container.num_bytes,
        metadata={**container.metadata, f"llama.{name}": value},
        tensors=container.tensors,
    )
    from layerskip.checkpoint.gguf.config import read_raw_config

    with pytest.raises(CheckpointError, match=said):
        read_raw_config(changed)


def test_arrays_of_every_kind(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("numbers", [1, 2, 300])
    writer.add_array("truths", [True, False])
    writer.add_array("texts", ["", "ä", "日本"])
    writer.add_float64("double", 0.1)
    writer.add_int64("long", -(2**40))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_container(tmp_path / "model.gguf").metadata
    assert np.array_equal(metadata["numbers"], [1, 2, 300])
    assert metadata["truths"].tolist() == [True, False]
    assert metadata["texts"] == ["", "ä", "日本"]
    assert (metadata["double"], metadata["long"]) == (0.1, -(2**40))


def test_arrays_nested_without_end(tmp_path: Path, refused: Callable[..., str]) -> None:
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(100_000)) + struct.pack("<IQ", 4, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("deep") + struct.pack("<I", 9)
    assert "arrays within arrays" in refused(header + nested)
