"""A tiny byte-level tokenizer, and a random network that writes with it."""

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import contributing_layer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import layerskip
from layerskip.language_model import LanguageModel

SPECIAL = ["<s>", "</s>"]
PIECES = [
    *(character.encode() for character in "abcdefgh ,.\n"),
    *(b"\xc3", b"\xa9", b"\xbc"),  # halves of é and ü
    *(b"\xe6", b"\x97", b"\xa5"),  # thirds of 日
    *(b"\xf0\x9f", b"\x98", b"\x80"),  # parts of 😀
    *(text.encode() for text in ("ab", " the", "cab", "é", "日")),
    *(b"a\xc3", b"\xa9b", b" \xf0"),  # a character and half of another
]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens cut through accents, CJK and emoji; ids are the places in `SPECIAL + PIECES`.

    None of its special tokens is called the end of a text, so that a random network writes on.
    """
    letters = byte_letters()
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for piece in PIECES:
        vocab["".join(letters[byte] for byte in piece)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=["</s>"])


@pytest.fixture(scope="session")
def piece_ids() -> dict[bytes, int]:
    """Token id of each piece of `byte_tokenizer`."""
    return {piece: len(SPECIAL) + i for i, piece in enumerate(PIECES)}


@pytest.fixture(scope="session")
def text_lm(tiny_checkpoint: Callable[..., Any], byte_tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A random network of 5 layers that writes byte-level text; its late layers change little, so drafts hold often."""
    folder = tiny_checkpoint(vocab_size=len(SPECIAL) + len(PIECES), num_hidden_layers=5, seed=3)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if contributing_layer(name) >= 2:
            tensor.mul_(0.25)
    save_file(tensors, path, metadata={"format": "pt"})
    byte_tokenizer.save_pretrained(folder)
    return layerskip.load(str(folder), dtype="float32", device="cpu")
