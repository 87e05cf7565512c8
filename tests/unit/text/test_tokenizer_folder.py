"""Tokenizers read without transformers give what transformers gives; what only transformers can read is left to it."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hub_folders import NAMES
from same_tokenizers import assert_same, hub_tokenizer
from tiny_tokenizers import byte_fallback, byte_level, unigram, word_piece
from transformers import PreTrainedTokenizerFast

from layerskip.checkpoint.checkpoint import DEMO_FOLDER
from layerskip.checkpoint.folder import HuggingFaceFolder
from layerskip.model.config.families import FAMILIES
from layerskip.text.tokenizer_folder import FAMILY_CLASSES, TokenizerFolder

FOR_TRANSFORMERS = {"llama-2-7b-chat": "LlamaTokenizer", "smollm2-135m-instruct": "GPT2Tokenizer"}
"""Folders whose class makes other tokens than tokenizer.json does, by what they name."""
CLASSES = [
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "TokenizersBackend",
]
TINY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama 2": partial(byte_fallback, "llama2"),
    "mistral": partial(byte_fallback, "mistral"),
    "gemma": partial(byte_fallback, "gemma"),
    "byte-level": byte_level,
    "word piece": word_piece,
    "unigram": unigram,
}


def change(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    content = {key: value for key, value in (content | keys).items() if value is not ...}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def check_same(folder: Path) -> None:
    """What is read without transformers is what transformers reads."""
    files = TokenizerFolder(folder)
    assert files.why_transformers() is None
    assert_same(files.read(), HuggingFaceFolder(folder).tokenizer)


def test_every_family_has_its_class() -> None:
    assert set(FAMILY_CLASSES) == set(FAMILIES)


def test_the_embedded_model() -> None:
    check_same(DEMO_FOLDER)


@pytest.mark.parametrize("name", NAMES)
class TestFoldersOfTheHub:
    def test_as_published(self, name: str, tmp_path: Path) -> None:
        folder = hub_tokenizer(name, tmp_path)
        if name in FOR_TRANSFORMERS:
            assert TokenizerFolder(folder).why_transformers() == f"its class is {FOR_TRANSFORMERS[name]}"
        else:
            check_same(folder)

    def test_as_transformers_saves_them(self, name: str, tmp_path: Path) -> None:
        folder = hub_tokenizer(name, tmp_path / "hub")
        HuggingFaceFolder(folder).tokenizer.save_pretrained(tmp_path / "saved")
        shutil.copy(folder / "config.json", tmp_path / "saved")
        if name not in FOR_TRANSFORMERS:
            check_same(tmp_path / "saved")

    def test_with_any_class_in_any_family(self, name: str, tmp_path: Path) -> None:
        folder, num_read = hub_tokenizer(name, tmp_path), 0
        for kind, family in product(CLASSES, FAMILIES):
            change(folder, "tokenizer_config.json", tokenizer_class=kind)
            (folder / "config.json").write_text(json.dumps({"model_type": family}))
            if TokenizerFolder(folder).why_transformers() is None:
                num_read += 1
                check_same(folder)
        assert num_read >= 2 * len(FAMILIES)  # with the two names of the general class

    def test_without_names_of_special_tokens(self, name: str, tmp_path: Path) -> None:
        """The class has its own names for some."""
        if name not in FOR_TRANSFORMERS:
            folder = hub_tokenizer(name, tmp_path)
            names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
            change(folder, "tokenizer_config.json", **dict.fromkeys(names, ...))
            if TokenizerFolder(folder).why_transformers() is None:
                check_same(folder)


@pytest.mark.parametrize("kind", TINY)
def test_kinds_of_tokenizers(kind: str, tmp_path: Path) -> None:
    tokenizer = TINY[kind]()
    tokenizer.save_pretrained(tmp_path)
    check_same(tmp_path)


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """A folder of the general class."""
    byte_level().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "templates",
    [
        {"tokenizer_config.json": "own"},
        {"tokenizer_config.json": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
        {"tokenizer_config.json": {"default": "a", "rag": "b"}},
        {"tokenizer_config.json": "own", "chat_template.jinja": "file"},
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
        {"tokenizer_config.json": "own", "additional_chat_templates/tool_use.jinja": "tools"},
        {"additional_chat_templates/default.jinja": "only"},
    ],
)
def test_wherever_chat_templates_are(general: Path, templates: dict[str, Any]) -> None:
    for file, content in templates.items():
        if file.endswith(".json"):
            change(general, file, chat_template=content)
        else:
            (general / file).parent.mkdir(exist_ok=True)
            (general / file).write_text(content, "utf-8")
    check_same(general)


@pytest.mark.parametrize(
    "keys",
    [
        {"bos_token": "th"},  # ordinary pieces of the vocabulary, and none of it
        {"pad_token": "<pad>", "mask_token": "<mask>"},
        {"additional_special_tokens": ["<one>", "<|im_end|>"]},
        {"extra_special_tokens": ["<one>"], "additional_special_tokens": ["<two>"]},
        {"extra_special_tokens": {"image_token": "<|im_start|>", "sound_token": "<sound>"}},
        {"video_token": "<|im_start|>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": None, "unk_token": ...},
        {"clean_up_tokenization_spaces": True, "add_prefix_space": True, "legacy": True, "model_max_length": 5},
    ],
)
def test_special_tokens_that_tokenizer_config_names(general: Path, keys: dict[str, Any]) -> None:
    change(general, "tokenizer_config.json", **{"extra_special_tokens": ..., **keys})
    check_same(general)


def test_truncation_does_not_act(general: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    change(general, "tokenizer.json", truncation=truncation)
    check_same(general)


def test_special_tokens_are_added_as_tokenizer_json_says(general: Path) -> None:
    """add_bos_token is passed over where there is a tokenizer.json."""
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    change(general, "tokenizer.json", post_processor=template)
    change(general, "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    check_same(general)
    assert TokenizerFolder(general).read().encode("<s>hi")[:2] == [1, 1]


def added(content: str, **settings: bool) -> dict[str, Any]:
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": content, **dict.fromkeys(names, False), **settings}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "its class is 'BertTokenizer' for a model of type None"),
        ({"tokenizer_class": ...}, "its class is None"),
        ({"tokenizer_class": 5}, "its class is 5"),
        ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}, "names code of its own"),
        ({"fix_mistral_regex": True}, "'fix_mistral_regex'"),
        ({"split_special_tokens": True}, "'split_special_tokens'"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "'fast_tokenizer_files'"),
        ({"bos_token": 5}, "can't be read"),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True}}, "can't be read"),
        ({"additional_special_tokens": [5], "extra_special_tokens": ...}, "can't be read"),
        ({"chat_template": 5}, "can't be read"),
        ({"chat_template": [{"name": "default"}]}, "can't be read"),
        ({"added_tokens_decoder": {"1": added("<s>", special=True, lstrip=True)}}, "other added tokens"),
        ({"added_tokens_decoder": {"900": added("<new>")}}, "other added tokens"),
        ({"added_tokens_decoder": {"one": added("<s>")}}, "can't be read"),
    ],
)
def test_what_only_transformers_reads(general: Path, keys: dict[str, Any], reason: str) -> None:
    change(general, "tokenizer_config.json", **keys)
    assert reason in str(TokenizerFolder(general).why_transformers())


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "Unheard"}}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_left_to_transformers(general: Path, file: str, content: str) -> None:
    (general / file).write_text(content)
    assert TokenizerFolder(general).why_transformers() is not None


def test_files_that_change_what_tokenizer_json_says(general: Path) -> None:
    for file in ("special_tokens_map.json", "added_tokens.json"):
        (general / file).write_text("{}")
        assert TokenizerFolder(general).why_transformers() == f"there is {file}"
        change(general, "tokenizer_config.json", added_tokens_decoder={})
        assert TokenizerFolder(general).why_transformers() is None
        change(general, "tokenizer_config.json", added_tokens_decoder=...)
        (general / file).unlink()
    (general / "tokenizer.json").unlink()
    assert TokenizerFolder(general).why_transformers() == "there is no tokenizer.json"


@pytest.mark.parametrize(
    ("name", "part", "content"),
    [
        ("qwen3-0.6b", "normalizer", {"type": "NFKC"}),
        ("qwen3-0.6b", "decoder", {"type": "Fuse"}),
        ("qwen3-0.6b", "pre_tokenizer", {"type": "Digits", "individual_digits": True}),
        ("gemma-3-270m-it", "normalizer", None),
        ("gemma-3-270m-it", "pre_tokenizer", None),
        ("gemma-3-270m-it", "decoder", {"type": "Fuse"}),
    ],
)
def test_parts_that_the_class_builds_otherwise(name: str, part: str, content: Any, tmp_path: Path) -> None:
    folder = hub_tokenizer(name, tmp_path)
    change(folder, "tokenizer.json", **{part: content})
    reason = TokenizerFolder(folder).why_transformers()
    assert reason is not None
    assert reason.endswith(f"has another {part}")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("qwen3-0.6b", "ignore_merges", True),
        ("qwen3-0.6b", "fuse_unk", True),
        ("gemma-3-270m-it", "byte_fallback", False),
        ("gemma-3-270m-it", "unk_token", "<pad>"),
        ("gemma-3-270m-it", "dropout", 0.5),
    ],
)
def test_models_that_the_class_builds_otherwise(name: str, setting: str, value: Any, tmp_path: Path) -> None:
    folder = hub_tokenizer(name, tmp_path)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    change(folder, "tokenizer.json", model=model | {setting: value})
    assert str(TokenizerFolder(folder).why_transformers()).endswith(f"has another {setting}")
