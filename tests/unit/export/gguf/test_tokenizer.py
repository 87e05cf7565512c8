"""The tokenizer in an exported GGUF file gives the tokens of the original, to our reader and to llama.cpp."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_files import add_value
from same_tokenizers import TEXTS, hub_tokenizer

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.gguf.container import read_container
from layerskip.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizer, name_pre_tokenizer
from layerskip.checkpoint.gguf.tokenizer import build_text_tokenizer, build_tokenizer, end_of_text_ids
from layerskip.errors import TokenizerError
from layerskip.export.gguf.tokenizer import PROBES, tokenizer_keys
from layerskip.export.gguf.write import export_gguf

Tiny = Callable[..., Path]
KEY = "tokenizer.ggml."
FROZEN = json.loads((Path(__file__).parents[2] / "data" / "gguf_tokenizers.json").read_text())
"""Small vocabularies."""
NAMES = {
    "llama-3.2-1b-instruct": "llama-bpe",
    "qwen2.5-0.5b-instruct": "qwen2",
    "qwen3-0.6b": "qwen2",
    "smollm2-135m-instruct": "gpt-2",  # transformers' class doesn't take the file's step that cuts digits
    "phi-4-mini-instruct": "gpt-4o",
}
"""Published tokenizers of byte-level BPE, and what llama.cpp calls their ways to cut text."""
SENTENCE_PIECE = ("gemma-3-270m-it", "llama-2-7b-chat", "mistral-7b-instruct-v0.3")
"""Published tokenizers of SentencePiece's kind; Gemma's has a token beyond the embedding."""


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")


def export(folder: Path, file: Path) -> Checkpoint:
    export_gguf(open_checkpoint(str(folder)), file, exit_layer=1, type_name="bf16")
    return open_checkpoint(str(file))


@pytest.mark.parametrize("name", NAMES)
def test_published_tokenizers_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    original = Checkpoint.in_folder(hub_tokenizer(name, tmp_path))
    keys, _ = tokenizer_keys(original, original.config)
    assert keys[f"{KEY}pre"] == NAMES[name]
    ours, theirs = build_text_tokenizer(keys), original.text_tokenizer
    for text in (*TEXTS, *PROBES):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text), clean_up_tokenization_spaces=False) == theirs.decode(
            theirs.encode(text), clean_up_tokenization_spaces=False
        )
    for special in ("bos_token", "eos_token"):
        assert ours.special_tokens_map.get(special) == theirs.special_tokens_map.get(special)
    assert ours.chat_template == theirs.chat_template
    assert set(original.eos_token_ids) <= set(end_of_text_ids(keys))


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_published_sentence_piece_tokenizers(name: str, tmp_path: Path) -> None:
    """But for spaces before a text, of which llama.cpp puts one more where the tokenizer puts any."""
    original = Checkpoint.in_folder(hub_tokenizer(name, tmp_path))
    keys, notes = tokenizer_keys(original, original.config)
    assert keys[f"{KEY}model"] == "llama"
    assert len(keys[f"{KEY}tokens"]) == original.config.vocab_size
    ours, theirs = build_text_tokenizer(keys), original.text_tokenizer
    other = {text for text in (*TEXTS, *PROBES) if ours.encode(text) != theirs.encode(text)}
    assert all(text.startswith((" ", "▁")) for text in other)
    assert bool(other) == any("begins with a space" in note for note in notes)
    assert keys[f"{KEY}add_space_prefix"] == bool(other)


def test_the_demo_s_tokenizer(tmp_path: Path) -> None:
    written = export_and_open("demo", tmp_path / "demo.gguf")
    theirs = open_checkpoint("demo").text_tokenizer
    assert all(written.text_tokenizer.encode(text) == theirs.encode(text) for text in (*TEXTS, *PROBES))
    assert written.eos_token_ids == open_checkpoint("demo").eos_token_ids
    assert written.config.bos_token_id == 0


def export_and_open(model: str, file: Path) -> Checkpoint:
    export_gguf(open_checkpoint(model), file, exit_layer=1, type_name="bf16")
    return open_checkpoint(str(file))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_merges_become_scores(prefix: bool, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A vocabulary whose merges follow its scores, as transformers makes them of SentencePiece's."""
    folder = write_sentence_piece(tiny_checkpoint, prefix=prefix)
    written = export(folder, tmp_path / "model.gguf")
    theirs = open_checkpoint(str(folder)).text_tokenizer
    for text in (*TEXTS, *PROBES):
        assert written.text_tokenizer.encode(text) == theirs.encode(text), text
    metadata = read_container(tmp_path / "model.gguf").metadata
    assert metadata[f"{KEY}model"] == "llama"
    assert metadata[f"{KEY}add_space_prefix"] is prefix


def write_sentence_piece(tiny_checkpoint: Tiny, *, prefix: bool) -> Path:
    keys = {"model": "llama", **FROZEN["vocabularies"]["sentence_piece"], "add_space_prefix": prefix}
    keys |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = build_tokenizer({f"{KEY}{name}": value for name, value in keys.items()})
    folder = tiny_checkpoint(vocab_size=len(keys["tokens"]), bos_token_id=1, eos_token_id=2)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted({entry.names[0] for entry in PRE_TOKENIZERS.values()}))
def test_every_pre_tokenizer_finds_its_name_again(name: str) -> None:
    entry = find_pre_tokenizer(name)
    found = name_pre_tokenizer(entry.splits, whole_words=entry.whole_words, composes=entry.composes)
    again = find_pre_tokenizer(found)
    assert (again.splits, again.whole_words, again.composes) == (entry.splits, entry.whole_words, entry.composes)


def test_an_unknown_way_to_cut_text_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

    def edit(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}

    edit_tokenizer(folder, edit)
    with pytest.raises(TokenizerError, match=r"splits text by \\p\{L\}\+; llama\.cpp has no name for that"):
        export(folder, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", {"type": "Lowercase"}, "normalises text by Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "cuts text by a step"),
    ],
)
def test_steps_that_the_format_lacks_are_refused(
    part: str, value: dict[str, Any], message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tokenizer=True)
    edit_tokenizer(folder, lambda content: content.update({part: value}))
    with pytest.raises(TokenizerError, match=message):
        export(folder, tmp_path / "model.gguf")


def test_rows_without_a_token_get_names(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tokenizer=True, vocab_size=2100)
    export(folder, tmp_path / "model.gguf")
    metadata = read_container(tmp_path / "model.gguf").metadata
    assert len(metadata[f"{KEY}tokens"]) == 2100
    assert metadata[f"{KEY}tokens"][2099] == "[PAD2099]"
    assert metadata[f"{KEY}token_type"][2099] == 5


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the id 2047, and the model's embedding 2000 rows"):
        export(tiny_checkpoint(tokenizer=True, vocab_size=2000), tmp_path / "model.gguf")


def test_without_a_tokenizer_the_ids_of_ends_stay(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(bos_token_id=3, eos_token_id=5)
    result = export_gguf(open_checkpoint(str(folder)), tmp_path / "model.gguf")
    written = open_checkpoint(str(tmp_path / "model.gguf"))
    assert any("takes token ids, and no text" in note for note in result.notes)
    assert (written.config.bos_token_id, written.eos_token_ids) == (3, (5,))
    with pytest.raises(TokenizerError):
        _ = written.text_tokenizer


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("name", ["demo", "sentence piece", *NAMES, *SENTENCE_PIECE])
def test_llama_cpp_reads_the_same_tokens(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from llama_cpp import Llama

    if name == "demo":
        original = open_checkpoint(name)
    elif name == "sentence piece":
        original = Checkpoint.in_folder(write_sentence_piece(tiny_checkpoint, prefix=True))
    else:
        original = Checkpoint.in_folder(hub_tokenizer(name, tmp_path / "model"))
    keys, _ = tokenizer_keys(original, original.config)
    theirs = Llama(str(write_vocabulary(keys, tmp_path / "vocabulary.gguf")), vocab_only=True, verbose=False)
    texts = [text for text in PROBES if text.isascii()]  # llama.cpp knows no marks beyond, and doesn't compose them
    for text in texts:
        tokens = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert tokens == original.text_tokenizer.encode(text), text


def write_vocabulary(keys: dict[str, Any], file: Path) -> Path:
    """A file with a vocabulary and nothing else."""
    writer = GGUFWriter(file, "llama")
    for key, value in keys.items():
        add_value(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file
