"""Checkpoints as the hub has them, made small: the published files' keys and values, a tokenizer of the published kind.

`tests/data/hub/NAME/` holds config.json, generation_config.json, tokenizer_config.json and special_tokens_map.json.
Sizes are small (layers, width, heads); all else, vocabularies and the ids of special tokens too, is as published, and
the chat templates are shortened to what plain conversations need. Weights are random; merges are learned from a few
sentences.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import randomize

DATA = Path(__file__).parents[1] / "data" / "hub"
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the rain falls on the green hills of the valley.",
    "A helpful assistant answers the question: what is the answer to the question of the user?",
    "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, number))\n",
    "Die Antwort steht im Text, und der Text steht in der Antwort; où est la réponse à la question ?",
) * 3
NUM_MERGES = 160
SPACE = "▁"

# What splits a text before its parts are merged, as published.
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O_SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@dataclass(frozen=True, kw_only=True)
class TokenizerShape:
    """What a published tokenizer.json has beside its vocabulary."""

    first: int
    """Id of the first byte."""
    byte_level: bool = True
    """Byte-level BPE, or BPE on characters with bytes to fall back on."""
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any]
    begins_with: str | None = None
    """Token that the post-processor puts first."""
    ignore_merges: bool = False
    unknown: str | None = None


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


def _spaces(*steps: dict[str, Any]) -> dict[str, Any]:
    """A decoder for pieces with `SPACE` in place of spaces, and bytes."""
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *steps]}


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_QWEN = TokenizerShape(
    first=0, normalizer={"type": "NFC"}, pre_tokenizer=_split(QWEN_SPLIT), decoder={**BYTE_LEVEL, "use_regex": True}
)
_GEMMA = TokenizerShape(
    first=238,
    byte_level=False,
    normalizer=_REPLACE,
    pre_tokenizer={
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    decoder=_spaces(),
    begins_with="<bos>",
    unknown="<unk>",
)
SHAPES = {
    "gemma-3-1b-it": _GEMMA,
    "gemma-3-270m-it": _GEMMA,
    "llama-2-7b-chat": TokenizerShape(
        first=3,
        byte_level=False,
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE]},
        decoder=_spaces(_STRIP),
        begins_with="<s>",
        unknown="<unk>",
    ),
    "llama-3.2-1b-instruct": TokenizerShape(
        first=0,
        pre_tokenizer=_split(LLAMA3_SPLIT),
        decoder={**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True},
        begins_with="<|begin_of_text|>",
        ignore_merges=True,
    ),
    "mistral-7b-instruct-v0.3": TokenizerShape(
        first=771,
        byte_level=False,
        pre_tokenizer={"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
        decoder=_spaces(_STRIP),
        begins_with="<s>",
        unknown="<unk>",
    ),
    "phi-4-mini-instruct": TokenizerShape(
        first=0, pre_tokenizer=_split(GPT4O_SPLIT), decoder={**BYTE_LEVEL, "use_regex": True}
    ),
    "qwen2.5-0.5b-instruct": _QWEN,
    "qwen3-0.6b": _QWEN,
    "smollm2-135m-instruct": TokenizerShape(
        first=17,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
        },
        decoder={**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True},
        unknown="<|endoftext|>",
    ),
}
NAMES = tuple(SHAPES)


def make_hub_folder(name: str, folder: Path) -> None:
    """Write a checkpoint as the hub has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(make_tokenizer(name), ensure_ascii=False), "utf-8")
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model, seed=len(name))
    dtype = getattr(torch, raw["torch_dtype"])
    weights = {key: tensor.to(dtype).contiguous() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def swap_tokens(source: Path, target: Path, first: int, second: int) -> None:
    """Write a checkpoint in which two tokens have each other's rows of the embedding and the head."""
    shutil.copytree(source, target)
    weights = load_file(target / WEIGHTS)
    for name in {EMBEDDING, HEAD} & set(weights):
        weights[name][[first, second]] = weights[name][[second, first]]
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


def make_tokenizer(name: str) -> dict[str, Any]:
    """A tokenizer.json of the published kind, with the special tokens that tokenizer_config.json has."""
    shape = SHAPES[name]
    config = json.loads((DATA / name / "tokenizer_config.json").read_text("utf-8"))
    added = {int(number): token for number, token in config["added_tokens_decoder"].items()}
    model = _learn(shape, reserved=set(added))
    # Published vocabularies have no holes; in one with holes, added tokens keep their ids only if it has them as well.
    model["vocab"] |= {token["content"]: number for number, token in added.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in sorted(added.items())],
        "normalizer": shape.normalizer,
        "pre_tokenizer": shape.pre_tokenizer,
        "post_processor": _post_processor(shape, model["vocab"]),
        "decoder": shape.decoder,
        "model": model,
    }


def _learn(shape: TokenizerShape, reserved: set[int]) -> dict[str, Any]:
    """A BPE model with ids from `shape.first` on, bytes first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if shape.byte_level else []
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if shape.byte_level else pre_tokenizers.Metaspace()
    )
    characters = len({character for text in SENTENCES for character in text} | {SPACE})
    trainer = trainers.BpeTrainer(
        vocab_size=(len(alphabet) or characters) + NUM_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    if not shape.byte_level:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    ids = (number for number in range(shape.first, 1 << 20) if number not in reserved)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": shape.unknown,
        "continuing_subword_prefix": None if not shape.byte_level else "",
        "end_of_word_suffix": None if not shape.byte_level else "",
        "fuse_unk": not shape.byte_level,
        "byte_fallback": not shape.byte_level,
        "ignore_merges": shape.ignore_merges,
        "vocab": dict(zip(pieces, ids, strict=False)),
        "merges": learned["merges"],
    }


def _post_processor(shape: TokenizerShape, vocabulary: dict[str, int]) -> dict[str, Any] | None:
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if shape.begins_with is None:
        return plain
    token = shape.begins_with

    def template(*texts: str) -> list[dict[str, Any]]:
        steps: Sequence[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"SpecialToken": {"id": token, "type_id": place}}, {"Sequence": {"id": text, "type_id": place}})
            for place, text in enumerate(texts)
        ]
        return [part for step in steps for part in step]

    begin = {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}},
    }
    return {"type": "Sequence", "processors": [plain, begin]} if shape.byte_level else begin
