"""An exported GGUF file is the same model to our own reader, to the gguf package, and to llama.cpp if it is there."""

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import write_tiny_adapters
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

import layerskip
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.gguf.container import read_container
from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.export.first_layers import first_layers
from layerskip.export.gguf.config import architecture_of
from layerskip.export.gguf.tensors import TYPES
from layerskip.export.gguf.write import GGUFExport, export_gguf

Tiny = Callable[..., Path]
TOKENS = [5, 3, 80, 41, 9, 9, 17, 62, 33, 21, 2, 70]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama with tied weights": ("llama", {"tie_word_embeddings": True}),
    "llama with wide heads": ("llama", {"head_dim": 16}),
    "llama 3": ("llama", {"head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e6,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, scaled": (
        "gemma3_text",
        {
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 with a window": ("phi3", {"sliding_window": 5}),
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
IGNORED_WINDOW = ("mistral", "phi3 with a window")
"""Cases in which llama.cpp ignores a sliding window that is shorter than the text."""


def export(model: Path, output: Path, **options: Any) -> GGUFExport:
    return export_gguf(open_checkpoint(str(model)), output, **options)


def load(path: Path, **options: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(path), dtype="float32", device="cpu", **options)


def assert_same_config(file: Path, folder: Path, num_layers: int) -> None:
    """Our reader gets the configuration that was written."""
    _, wanted = first_layers(open_checkpoint(str(folder)), num_layers)
    found = open_checkpoint(str(file)).network_config
    if "sliding_attention" not in wanted.layer_types and wanted.model_type == "mistral":
        wanted = replace(wanted, model_type="llama")  # without a window it is one
    unused = {} if "sliding_attention" in wanted.layer_types else {"sliding_window": found.sliding_window}
    kinds = set(wanted.layer_types)
    assert {kind: found.ropes[kind] for kind in kinds} == {kind: wanted.ropes[kind] for kind in kinds}
    assert replace(found, ropes={}) == replace(wanted, ropes={}, **unused)


@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("case", FAMILIES)
def test_our_reader_gets_the_same_model_back(
    case: str, exit_layer: int | None, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    model_type, config = FAMILIES[case]
    folder = tiny_checkpoint(model_type, **config)
    file = tmp_path / "model.gguf"
    result = export(folder, file, exit_layer=exit_layer, type_name="f32")
    num_layers = exit_layer or 4
    assert (result.exit_layer, result.num_layers) == (num_layers, 4)
    assert_same_config(file, folder, num_layers)
    ours, theirs = open_checkpoint(str(file)).weights, open_checkpoint(str(folder)).weights
    kept = {name for name in theirs.names() if "layers." not in name or int(name.split(".")[2]) < num_layers}
    assert ours.names() == kept
    for name in kept:
        exact = model_type != "gemma3_text" or not name.endswith("norm.weight")  # 1 is added to these, which rounds
        torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3", "phi3", "llama 3"])
def test_logits_equal_the_originals(case: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model_type, config = FAMILIES[case]
    folder = tiny_checkpoint(model_type, **config)
    export(folder, tmp_path / "model.gguf", type_name="f32")
    options = {"max_context": 128}
    tolerance = 1e-5 if model_type == "gemma3_text" else 0
    ours, theirs = load(tmp_path / "model.gguf", **options), load(folder, **options)
    torch.testing.assert_close(ours.logits(TOKENS), theirs.logits(TOKENS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("type_name", TYPES)
def test_numbers_are_those_that_the_type_can_say(type_name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    result = export(folder, tmp_path / "model.gguf", type_name=type_name)
    ours, theirs = open_checkpoint(str(tmp_path / "model.gguf")).weights, open_checkpoint(str(folder)).weights
    for name in theirs.names():
        weight = theirs.get(name)
        type_ = TYPES["f32"] if weight.dim() == 1 else TYPES[type_name]
        if type_name == "q4_0" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            type_ = TYPES["q8_0"]
        rounded = torch.from_numpy(dequantize(quantize(weight.numpy(), type_), type_).reshape(weight.shape).copy())
        assert torch.equal(ours.get(name).float(), rounded), name
    assert sum(result.types.values()) == len(theirs.names())


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_the_gguf_package_reads_the_same_numbers(type_name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3", hidden_size=64, intermediate_size=96)
    file = tmp_path / "model.gguf"
    export(folder, file, type_name=type_name)
    ours = {name: read for name, read in tensors_of(file).items() if name != "token_embd.weight"}
    for tensor in GGUFReader(file).tensors:
        if tensor.name in ours:
            theirs = dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(ours[tensor.name], torch.from_numpy(theirs.copy()).reshape(ours[tensor.name].shape))


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    from layerskip.checkpoint.gguf.tensors import read_tensor

    return {name: read_tensor(entry).float() for name, entry in read_container(file).tensors.items()}


def test_rows_that_are_no_whole_blocks_are_float16(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", hidden_size=32, intermediate_size=56)
    export(folder, tmp_path / "model.gguf", type_name="q8_0")
    entries = read_container(tmp_path / "model.gguf").tensors
    assert entries["blk.0.ffn_down.weight"].type.name == "F16"  # 56 columns
    assert entries["blk.0.ffn_up.weight"].type.name == "Q8_0"
    assert entries["blk.0.attn_norm.weight"].type.name == "F32"
    assert "output.weight" in entries  # not tied


@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_0"])
def test_a_gguf_file_is_written_again_without_a_change(type_name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96)
    export(folder, tmp_path / "first.gguf", type_name=type_name)
    export(tmp_path / "first.gguf", tmp_path / "second.gguf", type_name=type_name)
    first, second = tensors_of(tmp_path / "first.gguf"), tensors_of(tmp_path / "second.gguf")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_samplers_are_kept(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    export(folder, tmp_path / "model.gguf")
    metadata = read_container(tmp_path / "model.gguf").metadata
    found = {key: metadata[f"general.sampling.{key}"] for key in ("temp", "top_k", "top_p")}
    assert found == {"temp": pytest.approx(0.6), "top_k": 20, "top_p": pytest.approx(0.95)}


def test_what_llama_cpp_ignores_is_said(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("mistral", sliding_window=16)
    assert any("sliding window of 16" in note for note in export(folder, tmp_path / "a.gguf").notes)
    write_tiny_adapters(folder, folder, [2])
    notes = export(folder, tmp_path / "b.gguf", exit_layer=2).notes
    assert any("exit adapters at exit 2, which are left out" in note for note in notes)


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "no activation 'gelu'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "no sliding windows"),
        ("qwen3", {"attention_bias": True}, "no biases of attention"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, "no such layers without rotary embedding"),
        ("qwen3_moe", {}, "no architecture for model_type 'qwen3_moe'"),
        ("gemma3_text", {"query_pre_attn_scalar": 5}, "no such factor on attention"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotated in part"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
            "no such pattern of sliding layers",
        ),
        (
            "qwen2",
            {"rope_parameters": {**LLAMA3}},
            "no rotary embedding of type 'llama3'",
        ),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    model_type: str, config: dict[str, Any], message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(tiny_checkpoint(model_type, **config), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_llama_cpp_lacks_is_refused_by_name(tiny_checkpoint: Tiny) -> None:
    config = replace(open_checkpoint(str(tiny_checkpoint())).config, model_type="newmodel")
    with pytest.raises(UnsupportedModelError, match=r"model_type 'newmodel'.*gemma3_text, granite, llama"):
        architecture_of(config)


def test_an_exit_that_does_not_exist_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"exit_layer 9 is outside 1\.\.4"):
        export(tiny_checkpoint(), tmp_path / "model.gguf", exit_layer=9)
    with pytest.raises(InvalidArgumentError, match="type must be one of f32"):
        export(tiny_checkpoint(), tmp_path / "model.gguf", type_name="q2_k")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_stays(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="exists; name a new file"):
        export(tiny_checkpoint(), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("case", [case for case in FAMILIES if case not in IGNORED_WINDOW])
def test_llama_cpp_gets_the_same_logits(case: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model_type, config = FAMILIES[case]
    folder = tiny_checkpoint(model_type, **config)
    export(folder, tmp_path / "model.gguf", type_name="f32")
    ours = load(folder, max_context=64).logits(TOKENS)
    tolerance = 1e-2 if model_type == "gemma3_text" else 1e-4  # llama.cpp takes GELU from a table in float16
    theirs = llama_cpp_logits(tmp_path / "model.gguf", TOKENS)
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


def llama_cpp_logits(file: Path, tokens: list[int]) -> torch.Tensor:
    """[tokens, V]."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    assert model, "llama.cpp can't load it"
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for token in tokens:
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (size,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(np.stack(rows))
