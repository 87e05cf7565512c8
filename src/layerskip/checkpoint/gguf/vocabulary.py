"""What a GGUF file says of its tokenizer, read from its key-value section and checked."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from layerskip.errors import TokenizerError

PREFIX = "tokenizer.ggml."
UNSUPPORTED_MODELS = ("bert", "t5", "rwkv", "plamo", "plamo2", "gemma4", "hybriddna", "whitespace", "none", "no_vocab")
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"


class TokenType(IntEnum):
    """What a token is (`tokenizer.ggml.token_type`)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Never text: begins and ends of texts and turns."""
    USER_DEFINED = 4
    """Text that is one token wherever it occurs."""
    UNUSED = 5
    BYTE = 6
    """`<0x0A>`: a byte of a character that is no token."""


def shown(value: object) -> str:
    """The value for an error message: whole if it is short, else its beginning and end."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    try:
        return shortener.repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class TokenizerKeys:
    """The key-value section with every value checked when it is asked for, since a file may hold anything."""

    values: Mapping[str, Any]

    def get(self, key: str, kind: type[Any], what: str) -> Any:
        """The value under a key, `None` if the file doesn't have it.

        Raises:
            TokenizerError: It is of another type.
        """
        value = self.values.get(key)
        if value is None or type(value) is kind:
            return value
        raise TokenizerError(f"the GGUF file's {key} must be {what}, got {shown(value)}")

    def text(self, key: str) -> str | None:
        """A string, that Unicode allows."""
        text: str | None = self.get(key, str, "a string")
        if text is not None:
            _check_unicode(key, text)
        return text

    def flag(self, key: str) -> bool | None:
        """True or false."""
        flag: bool | None = self.get(key, bool, "true or false")
        return flag

    def texts(self, key: str) -> list[str]:
        """A list of strings that the file must have."""
        texts = self._items(key)
        for index, text in enumerate(texts):
            if type(text) is not str:
                raise TokenizerError(f"the GGUF file's {key} must hold strings, and number {index} is {shown(text)}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            for index, text in enumerate(texts):
                _check_unicode(f"{key}[{index}]", text)
        return texts

    def numbers(self, key: str, count: int, *, whole: bool) -> list[float] | None:
        """A list with a finite number for each of `count` tokens; `None` if the file doesn't have it."""
        if key not in self.values:
            return None
        numbers = self._items(key)
        if len(numbers) != count:
            raise TokenizerError(f"the GGUF file has {count} tokens, but {len(numbers)} values in {key}; it is damaged")
        kinds = (int,) if whole else (int, float)
        for index, number in enumerate(numbers):
            if type(number) not in kinds or not _is_finite(number):
                what = "whole numbers" if whole else "numbers"
                raise TokenizerError(f"the GGUF file's {key} must hold {what}, and number {index} is {shown(number)}")
        return numbers

    def token_id(self, name: str, num_tokens: int) -> int | None:
        """The id under `tokenizer.ggml.NAME_token_id`, which must be one of the vocabulary's."""
        key = f"{PREFIX}{name}_token_id"
        token_id: int | None = self.get(key, int, "the id of a token")
        if token_id is not None and not 0 <= token_id < num_tokens:
            raise TokenizerError(
                f"the GGUF file's {key} is {shown(token_id)}, but the vocabulary has the ids 0 to {num_tokens - 1}"
            )
        return token_id

    def _items(self, key: str) -> list[Any]:
        items: list[Any] | None = self.get(key, list, "a list")
        if items is None:
            raise TokenizerError(f"the GGUF file has no {key}, which its tokenizer needs; it is damaged or incomplete")
        return items


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens by their ids."""

    model: str
    """`gpt2`: byte-level BPE; `llama`: SentencePiece's BPE by scores, with bytes for unknown characters."""
    tokens: list[str]
    types: list[int]
    """A `TokenType` for each token; all normal where the file doesn't say."""
    scores: list[float] | None

    def ids(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of these types."""
        return [token_id for token_id, token_type in enumerate(self.types) if token_type in types]


def read_vocabulary(metadata: TokenizerKeys) -> Vocabulary:
    """The tokens, their types and their scores.

    Raises:
        TokenizerError: The file has no vocabulary, a damaged one, or one of a kind that can't be read.
    """
    model = metadata.text(f"{PREFIX}model")
    if model is None:
        raise TokenizerError(
            f"the GGUF file has no {PREFIX}model, so it has no tokenizer; pass token ids in place of text"
        )
    if model not in (BYTE_LEVEL, SENTENCE_PIECE):
        known = "isn't supported" if model in UNSUPPORTED_MODELS else "isn't known"
        raise TokenizerError(
            f"the GGUF file's tokenizer is {model[:100]!r}, which {known}; supported are {BYTE_LEVEL} (byte-level BPE) "
            f"and {SENTENCE_PIECE} (SentencePiece)"
        )
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata.texts(f"{PREFIX}tokens"))]
    if not tokens:
        raise TokenizerError(f"the GGUF file's {PREFIX}tokens is empty; it is damaged")
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if first.setdefault(token, index) != index:
            raise TokenizerError(
                f"the GGUF file's tokens {first[token]} and {index} are the same, {shown(token)}; it is damaged"
            )
    types = metadata.numbers(f"{PREFIX}token_type", len(tokens), whole=True)
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=[TokenType.NORMAL] * len(tokens) if types is None else [int(kind) for kind in types],
        scores=metadata.numbers(f"{PREFIX}scores", len(tokens), whole=False),
    )


def _check_unicode(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenizerError(f"the GGUF file's {key} is no valid Unicode: {shown(text)}; it is damaged") from None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False
