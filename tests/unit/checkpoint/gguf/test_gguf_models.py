"""A GGUF file is the same model as the checkpoint that it was made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import convert, tiny_sizes
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.gguf.container import read_container
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.language_model import LanguageModel
from layerskip.text.tokenizer import TextTokenizer

Tiny = Callable[..., Path]
TOKENS = [5, 3, 80, 41, 9, 9, 17, 62, 33, 21, 2, 70]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and a head of its own": ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    "llama with tied weights": ("llama", {"tie_word_embeddings": True}),
    "llama with wide heads": ("llama", {"head_dim": 16}),
    "llama, linear scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
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
    "gemma3": ("gemma3_text", {"final_logit_softcapping": 20.0}),
    "gemma3, scaled": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": ("phi3", {"sliding_window": 5}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"tie_word_embeddings": True, "attention_bias": True}),
    "granite without factors": (
        "granite",
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 8**-0.5,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral with a window": ("mixtral", {"sliding_window": 5, "num_local_experts": 5}),
    "qwen3moe": ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": True, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 5}),
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


def load(path: Path, **options: Any) -> LanguageModel:
    return layerskip.load(str(path), dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_the_original_s(case: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model_type, config = FAMILIES[case]
    folder = tiny_checkpoint(model_type, **config)
    file = convert(folder, tmp_path / "model.gguf")
    ours, theirs = load(file), load(folder)
    assert ours.config.num_layers == theirs.config.num_layers
    tolerance = 1e-6 if model_type == "gemma3_text" else 0  # norms are stored with 1 added, which rounds
    torch.testing.assert_close(ours.logits(TOKENS), theirs.logits(TOKENS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", FAMILIES)
def test_transformers_gets_the_same_model(case: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model_type, config = FAMILIES[case]
    folder = tiny_checkpoint(model_type, **config)
    checkpoint = open_checkpoint(str(convert(folder, tmp_path / "model.gguf")))
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_transformers_model(checkpoint, torch.float32)
    ids = torch.tensor([TOKENS])
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


def test_llama_3_scaling_far_beyond_its_original_context(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Frequencies come from a tensor that transformers' own reader ignores."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    options = {"head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": scaling, "num_hidden_layers": 2}
    folder = tiny_checkpoint("llama", **options)
    file = convert(folder, tmp_path / "model.gguf")
    tokens = torch.randint(0, 96, (9000,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = load(file, max_context=9001).logits(tokens), load(folder, max_context=9001).logits(tokens)
    assert torch.equal(ours, theirs)
    plain = tiny_checkpoint("llama", **{**options, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})
    unscaled = load(plain, max_context=9001).logits(tokens)
    assert not torch.allclose(ours[-1], unscaled[-1], atol=1e-2)


def test_other_factors_on_frequencies(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Factors that aren't Llama 3's are taken as they are."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_checkpoint("llama", head_dim=16, rope_parameters=scaling)
    file = convert(folder, tmp_path / "model.gguf")
    assert open_checkpoint(str(file)).raw_config["rope_parameters"]["rope_type"] == "longrope"
    tokens = TOKENS * 10
    torch.testing.assert_close(load(file).logits(tokens), load(folder).logits(tokens), rtol=1e-4, atol=1e-4)
    model = load_transformers_model(open_checkpoint(str(file)), torch.float32)
    theirs = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(load(file).logits(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_gemma_3_27b_scales_attention_by_width_over_heads(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    for num_layers, scalar in ((4, 8), (62, 16)):
        folder = tiny_checkpoint("gemma3_text", num_hidden_layers=num_layers, num_attention_heads=2)
        file = convert(folder, tmp_path / f"{num_layers}.gguf")
        assert open_checkpoint(str(file)).raw_config["query_pre_attn_scalar"] == scalar


def test_a_short_decimal_number_comes_back(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    file = convert(tiny_checkpoint("llama", rms_norm_eps=1e-5), tmp_path / "model.gguf")
    assert open_checkpoint(str(file)).config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_types_that_converters_write(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The network has the numbers that the blocks stand for, in rows of Hugging Face's order."""
    type_ = GGMLQuantizationType[name]
    folder = tiny_checkpoint("llama", **tiny_sizes(name))
    file = convert(folder, tmp_path / "model.gguf", type_=type_)
    assert name in open_checkpoint(str(file)).contents.types
    model = load_transformers_model(open_checkpoint(str(file)), torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (key, weight), other in zip(model.named_parameters(), original.parameters(), strict=True):
        step = 2 * (other.max() - other.min()) / (15 if "4" in name else 31)
        assert (weight - other).abs().max() <= step, key
    theirs = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(load(file).logits(TOKENS), theirs, rtol=1e-4, atol=1e-4)


def test_parts_of_a_split_file(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    whole = convert(tiny_checkpoint(), tmp_path / "whole.gguf")
    tensors = GGUFReader(whole).tensors
    (tmp_path / "parts").mkdir()
    names = [tmp_path / "parts" / f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(names):
        metadata = {"split.no": number, "split.count": 3}
        if number == 0:
            convert_head(whole, path, metadata, tensors[:1])
            continue
        writer = GGUFWriter(path, "llama")
        for key, value in metadata.items():
            writer.add_uint16(key, value)
        for tensor in tensors[1:9] if number == 1 else tensors[9:]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    for given in (names[0], tmp_path / "parts"):
        assert torch.equal(load(given).logits(TOKENS), load(whole).logits(TOKENS))
    names[1].unlink()
    with pytest.raises(layerskip.LayerSkipError, match=r"model-00002-of-00003\.gguf is missing"):
        load(names[0])
    with pytest.raises(layerskip.LayerSkipError, match="name the first one"):
        load(names[2])


def convert_head(whole: Path, path: Path, metadata: dict[str, int], tensors: list[Any]) -> None:
    """The first part: all metadata, some tensors."""
    from gguf import GGUFWriter
    from gguf_files import add_value

    container = read_container(whole)
    writer = GGUFWriter(path, "llama")
    for key, value in container.metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for key, value in metadata.items():
        writer.add_uint16(key, value)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_that_holds_a_file(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    convert(folder, tmp_path / "model.gguf")
    convert(folder, tmp_path / "mmproj-model.gguf")  # the image part of a model, by its name
    assert torch.equal(load(tmp_path).logits(TOKENS), load(folder).logits(TOKENS))
    convert(folder, tmp_path / "other.gguf")
    with pytest.raises(layerskip.LayerSkipError, match=r"2 GGUF files \(model\.gguf, other\.gguf\); name the one"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert open_checkpoint(str(tmp_path)).contents.format == "safetensors"


def test_the_tokenizer_needs_no_transformers(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127))]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["a b"], "bos_token_id": 1, "eos_token_id": 2}
    keys |= {"tokens": [*tokens, "ab"], "token_type": [2, 3, 3, *[1] * (len(tokens) - 2)]}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    checkpoint = open_checkpoint(str(convert(tiny_checkpoint(), tmp_path / "model.gguf", metadata=metadata)))
    ours = checkpoint.text_tokenizer
    assert isinstance(ours, TextTokenizer)
    assert ours.encode("abc<s>") == checkpoint.tokenizer("abc<s>")["input_ids"]
    assert checkpoint.text_tokenizer is checkpoint.tokenizer


def test_each_file_has_tuned_settings_of_its_own(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from layerskip.checkpoint.tuned import TunedSettings, write_tuned

    file = convert(tiny_checkpoint(), tmp_path / "model.gguf")
    settings = TunedSettings(exit_layer=2, num_speculations=3, tokens_per_second=1.0, speedup=1.0)
    write_tuned(open_checkpoint(str(file)).files.tuned_file, settings)
    assert Checkpoint(GGUFFile(file), "").tuned == settings
    other = convert(tiny_checkpoint(), tmp_path / "other.gguf")
    assert Checkpoint(GGUFFile(other), "").tuned is None
