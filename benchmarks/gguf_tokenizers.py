"""Compares the token ids of tokenizers from GGUF files with llama.cpp's, text by text.

    python benchmarks/gguf_tokenizers.py                           # a small vocabulary with every pre-tokenizer
    python benchmarks/gguf_tokenizers.py MODEL.gguf OTHER.gguf     # real ones too
    python benchmarks/gguf_tokenizers.py --freeze MODEL.gguf       # llama.cpp's ids for the tests

The texts are in tokenizer_texts.json. Special tokens in them are parsed, and added if the file says so. The script
needs `pip install llama-cpp-python gguf`.
"""

import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import tyro
from gguf import GGUFReader, GGUFWriter
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from layerskip.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from layerskip.checkpoint.gguf.tokenizer import build_tokenizer

TEXTS = Path(__file__).parent / "tokenizer_texts.json"
FROZEN = Path(__file__).parents[1] / "tests" / "unit" / "data" / "gguf_tokenizers.json"
SPECIAL = ["<unk>", "<s>", "</s>"]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|endoftext|>"]
USER_DEFINED = ["<tool>", "\n\n\n"]
UNMERGED = ["ĠPascalCase", "ĠDonaudampfschifffahrtsgesellschaftskapitÃ¤n"]
"""Words that no merges produce; they become tokens only if whole words are looked up first."""
LLAMA_CPP_WORDS = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*",
)
LLAMA_CPP_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
LLAMA_CPP = {
    "tekken": {"splits": ["|".join(LLAMA_CPP_WORDS) + r"|\p{N}" + LLAMA_CPP_REST]},
    "gpt-4o": {"splits": ["|".join(w + CONTRACTION for w in LLAMA_CPP_WORDS) + r"|\p{N}{1,3}" + LLAMA_CPP_REST]},
    "qwen2": {"composes": False},
    "qwen35": {"composes": False},
    **{
        name: {"splits": [split.replace("]+", r"&&[^\s]]+") for split in PRE_TOKENIZERS[name].splits]}
        for name in ("deepseek-llm", "deepseek-coder")
    },
}
"""Settings, by the first name in our table, with which our tokenizers split as llama.cpp does where it differs from the
models' own tokenizers: it has no case and no marks beyond ASCII, doesn't compose characters with their marks, and takes
spaces beyond ASCII out of listed characters."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the comparison."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """GGUF files to compare besides the small vocabularies."""
    json: bool = False
    """Print every difference as JSON instead of the table."""
    freeze: bool = False
    """Train the small vocabularies anew, and write llama.cpp's ids for them and the files as the tests' data."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tokenizer against llama.cpp."""

    name: str
    ids: list[list[int]]
    """llama.cpp's ids of each text."""
    differing: list[dict[str, Any]]
    """Texts with other ids: the text, our ids, llama.cpp's ids."""
    differing_as_llama_cpp: int
    """Texts with other ids when our tokenizer splits as llama.cpp does (`LLAMA_CPP`)."""
    seconds: float
    """Seconds to build our tokenizer from the metadata."""


def main(settings: Settings) -> None:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        sys.exit("skipped: llama-cpp-python isn't installed (pip install llama-cpp-python)")
    texts = [text for group in json.loads(TEXTS.read_text()).values() for text in group]
    vocabularies = train_vocabularies(texts) if settings.freeze else json.loads(FROZEN.read_text())["vocabularies"]
    rows = [compare(name, metadata, texts) for name, metadata in small_tokenizers(vocabularies)]
    rows += [compare(file.stem, read_metadata(file), texts, file) for file in settings.files]
    if settings.freeze:
        freeze(vocabularies, rows)
    if settings.json:
        print(json.dumps([{**vars(row), "ids": None} for row in rows], indent=1))
        return
    table = Table("tokenizer", "texts", "equal", "equal, split as llama.cpp splits", "seconds to build")
    for row in rows:
        equal = [len(texts) - count for count in (len(row.differing), row.differing_as_llama_cpp)]
        table.add_row(row.name, str(len(texts)), *map(str, equal), f"{row.seconds:.2f}")
    Console().print(table)


def compare(name: str, metadata: dict[str, Any], texts: list[str], file: Path | None = None) -> Row:
    """Our ids and llama.cpp's for each text."""
    with tempfile.TemporaryDirectory() as folder:
        ids = llama_cpp_ids(file or write_gguf(metadata, Path(folder) / "vocabulary.gguf"), texts)
    start = time.perf_counter()
    tokenizer = build_tokenizer(metadata)
    seconds = time.perf_counter() - start
    differing = differences(tokenizer, texts, ids)
    return Row(
        name=name,
        ids=ids,
        differing=differing,
        differing_as_llama_cpp=len(differences(as_llama_cpp(metadata), texts, ids)) if differing else 0,
        seconds=seconds,
    )


def differences(tokenizer: PreTrainedTokenizerFast, texts: list[str], ids: list[list[int]]) -> list[dict[str, Any]]:
    """Texts whose ids differ from these."""
    ours = [tokenizer(text)["input_ids"] for text in texts]
    return [
        {"text": text, "ours": mine, "llama.cpp": theirs}
        for text, mine, theirs in zip(texts, ours, ids, strict=True)
        if mine != theirs
    ]


def as_llama_cpp(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Our tokenizer, split as llama.cpp splits."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    entry = PRE_TOKENIZERS[name]
    with patch.dict(PRE_TOKENIZERS, {name: replace(entry, **LLAMA_CPP.get(entry.names[0], {}))}):
        return build_tokenizer(metadata)


def llama_cpp_ids(file: Path, texts: list[str]) -> list[list[int]]:
    """llama.cpp's ids, with the begin and end tokens that the file adds."""
    from llama_cpp import Llama

    model = Llama(str(file), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value section."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


def write_gguf(metadata: dict[str, Any], file: Path) -> Path:
    """Write a file with a vocabulary and nothing else."""
    writer = GGUFWriter(file, metadata["general.architecture"])
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in metadata.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def small_tokenizers(vocabularies: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and metadata of each small tokenizer: every pre-tokenizer, and the forms of SentencePiece."""
    byte_level = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"} | keys(vocabularies["byte_level"])
    for name in PRE_TOKENIZERS:
        yield name, byte_level | {"tokenizer.ggml.pre": name}
    ends = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    yield "gpt-2, adds both", byte_level | {"tokenizer.ggml.pre": "gpt-2"} | ends
    sentence_piece = {"general.architecture": "llama", "tokenizer.ggml.model": "llama"}
    sentence_piece |= keys(vocabularies["sentence_piece"])
    yield "llama", sentence_piece
    yield "llama, no space prefix", sentence_piece | {"tokenizer.ggml.add_space_prefix": False}
    yield "llama, adds both", sentence_piece | ends
    no_user_defined = [1 if kind == 4 else kind for kind in vocabularies["sentence_piece"]["token_type"]]
    phi3 = {"general.architecture": "phi3", "general.name": "Phi-3", "tokenizer.ggml.token_type": no_user_defined}
    yield "phi3", sentence_piece | phi3


def keys(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """A vocabulary's parts under their keys."""
    ids = {f"tokenizer.ggml.{name}_token_id": index for index, name in enumerate(("unknown", "bos", "eos"))}
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()} | ids


def train_vocabularies(texts: list[str]) -> dict[str, Any]:
    """Small vocabularies with tokens of every script, and merges across all borders of words."""
    added = re.compile("|".join(re.escape(token) for token in SPECIAL + CONTROL + USER_DEFINED))
    texts = [piece for text in texts for piece in added.split(text)]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1800,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=9,
        show_progress=False,
    )
    byte_level.train_from_iterator(texts, trainer)
    byte_tokens, byte_merges = trained(byte_level)
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, limit_alphabet=350, show_progress=False))
    tokens, merges = trained(pieces)
    merged = list(dict.fromkeys(left + right for left, right in merges))
    characters = sorted(token for token in tokens if len(token) == 1)
    hexadecimal = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "byte_level": {
            "tokens": byte_tokens + UNMERGED + CONTROL + USER_DEFINED,
            "token_type": [3] * 3
            + [1] * (len(byte_tokens + UNMERGED) - 3)
            + [3] * len(CONTROL)
            + [4] * len(USER_DEFINED),
            "merges": [" ".join(merge) for merge in byte_merges],
        },
        "sentence_piece": {
            "tokens": SPECIAL + hexadecimal + merged + characters + CONTROL + USER_DEFINED,
            "token_type": [2, 3, 3]
            + [6] * 256
            + [1] * (len(merged) + len(characters))
            + [3] * len(CONTROL)
            + [4] * len(USER_DEFINED),
            "scores": [0.0] * 259
            + [-float(rank) for rank in range(len(merged) + len(characters))]
            + [-1000.0] * (len(CONTROL) + len(USER_DEFINED)),
        },
    }


def trained(tokenizer: Tokenizer) -> tuple[list[str], list[list[str]]]:
    """Tokens by id, and merges in order."""
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def freeze(vocabularies: dict[str, Any], rows: list[Row]) -> None:
    """Write the tests' data: all ids of real tokenizers, and for small ones a checksum of each text's ids."""
    small = {name for name, _ in small_tokenizers(vocabularies)}
    firsts = small - set(PRE_TOKENIZERS) | {entry.names[0] for entry in PRE_TOKENIZERS.values()}
    checksums = {row.name: [checksum(ids) for ids in row.ids] for row in rows if row.name in firsts}
    real = {row.name: row.ids for row in rows if row.name not in small}
    content = {"vocabularies": vocabularies, "llama.cpp": LLAMA_CPP, "checksums": checksums, "ids": real}
    sections = []
    for section, parts in content.items():
        lines = [f"{json.dumps(name)}:{json.dumps(part, separators=(',', ':'))}" for name, part in parts.items()]
        sections.append(f"{json.dumps(section)}:{{\n" + ",\n".join(lines) + "\n}")
    FROZEN.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def checksum(ids: list[int]) -> str:
    """A short hash of token ids."""
    return f"{zlib.crc32(json.dumps(ids).encode()):08x}"[:6]


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
