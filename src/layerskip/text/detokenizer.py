"""Text out of tokens, as they come: detokenisation that never shows half a character, and stop strings."""

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast
from weakref import WeakKeyDictionary

from layerskip.text.tokenizer import TextTokenizer, Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that aren't a whole character."""
CONTEXT = 4
"""Tokens that are read again with the next ones. A character has at most four bytes: three tokens can have begun one,
and one more says whether a leading space is part of the text."""
WINDOW = 8
"""Tokens that are read again before those in front of the context are forgotten."""
PROMPT_TAIL = 64
"""Tokens at a prompt's end among which its context is looked for: special ones have no text to be context."""
HALF = 3
"""Most bytes of an incomplete character."""


class Detokenizer:
    """Turns one row's tokens into text piece by piece.

    Together the pieces are what the tokenizer's own decoding adds to the prompt's text. A character that isn't complete
    yet waits. Bytes that can't become a character any more are given as the replacement character, as soon as that is
    certain. Reading a token takes the same time whatever came before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """Start after a prompt.

        Args:
            tokenizer: The checkpoint's tokenizer.
            prompt: Token ids of the prompt; only its end is used.
        """
        self._decode_ids = _decoder(tokenizer)
        vocabulary = _vocabulary(tokenizer)
        self._special, self._byte_of = vocabulary.special.keys(), vocabulary.byte_of
        tail = [token for token in prompt[-PROMPT_TAIL:] if token not in self._special]
        self._half = self._begun(tail)
        self._is_prompts = bool(self._half)
        """Whether the prompt began that character: if it stays incomplete, it isn't the new text's."""
        self._window = tail[-CONTEXT:]
        self._known = self._decode(self._window)
        """The part of the window's text that was given, or is the prompt's."""

    def push(self, *tokens: int) -> str:
        """The text that the next tokens complete, possibly none."""
        if not self._special.isdisjoint(tokens):
            tokens = tuple(token for token in tokens if token not in self._special)
        if not self._byte_of:
            return self._read(tokens)
        runs = groupby(tokens, key=self._byte_of.__contains__)
        return "".join(self._read_bytes(list(run)) if single else self._read_others(tuple(run)) for single, run in runs)

    def peek(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` would add, without adding them."""
        return copy(self).push(*tokens)  # attributes are replaced, never changed in place

    def _read(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        self._window = [*self._window, *tokens]
        text = self._decode(self._window)
        if not text.startswith(self._known):  # the prompt ended in the middle of a character, completed by now
            self._known = self._known.removesuffix(REPLACEMENT)
        certain = text if self._byte_of or text == self._known else text.removesuffix(REPLACEMENT)
        piece = certain[len(self._known) :]
        if piece:
            self._known = certain
        return piece + self._shorten(waits=text != certain) if len(self._window) > WINDOW else piece

    def _shorten(self, *, waits: bool) -> str:
        """Forget the window's beginning; give what waits in it if that can't become a character any more."""
        recent = self._window[-CONTEXT:]
        known = self._decode(recent)
        if not known:  # tokens that give no text are no context
            recent = [*self._window[: CONTEXT - HALF], *self._window[-HALF:]]
            known = self._decode(recent)
        still = waits and known.endswith(REPLACEMENT)
        self._window, self._known = recent, known.removesuffix(REPLACEMENT) if still else known
        return REPLACEMENT if waits and not still else ""

    def _read_bytes(self, tokens: list[int]) -> str:
        """Text of tokens that are single bytes; one broken byte makes a tokenizer's decoding give up all around it."""
        given = self._half + bytes(self._byte_of[token] for token in tokens)
        text, used = utf_8_decode(given, "replace", False)
        self._half = given[used:]
        if used and self._is_prompts:
            text, self._is_prompts = text.removeprefix(REPLACEMENT), False
        self._window = tokens[-1:]  # whatever byte it is, it says that a text's beginning is elsewhere
        self._known = self._decode(self._window)
        return text

    def _read_others(self, tokens: Sequence[int]) -> str:
        """Text of tokens that no byte before them belongs to."""
        broken = REPLACEMENT if self._half and not self._is_prompts else ""
        self._half, self._is_prompts = b"", False
        return broken + self._read(tokens)

    def _begun(self, tail: Sequence[int]) -> bytes:
        """The bytes of a character in whose middle single-byte tokens end."""
        run = []
        for token in reversed(tail[-HALF:]):
            if token not in self._byte_of:
                break
            run.append(self._byte_of[token])
        given = bytes(reversed(run))
        return given[utf_8_decode(given, "replace", False)[1] :]

    def _decode(self, tokens: list[int]) -> str:
        return self._decode_ids(tokens) if tokens else ""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a tokenizer's tokens are to the reader of a text."""

    special: Mapping[int, str]
    """Tokens that give no text, and what they are called."""
    byte_of: Mapping[int, int]
    """Tokens that are single bytes of a character that has no token (Llama 2, Mistral, Gemma)."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Ask a tokenizer."""
        decode = _decoder(tokenizer)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {index for index in tokenizer.all_special_ids if index is not None}
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        indices: Any = tokenizer.convert_tokens_to_ids(names)
        found = tokenizer.convert_ids_to_tokens([0 if index is None else index for index in indices])
        byte_of = {index: byte for byte, index in enumerate(indices) if found[byte] == names[byte]}
        letter = next((index for index, byte in byte_of.items() if byte == ord("A")), None)
        falls_back = letter is not None and decode([letter]) == "A"
        silent = [index for index in special if not decode([index])]
        return cls(
            special=dict(zip(silent, map(str, tokenizer.convert_ids_to_tokens(silent)), strict=True)),
            byte_of=byte_of if falls_back else {},
        )


_VOCABULARIES: "WeakKeyDictionary[Tokenizer, tuple[int, Vocabulary]]" = WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer's vocabulary, kept for as long as no token is added."""
    size, known = _VOCABULARIES.get(tokenizer, (None, None))
    if known is None or size != len(tokenizer):
        known = Vocabulary.of(tokenizer)
        _VOCABULARIES[tokenizer] = len(tokenizer), known
    return known


def special_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Tokens that give no text, and what they are called."""
    return _vocabulary(tokenizer).special


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """Token ids to text, special tokens left out.

    The way of transformers' fast tokenizers takes several times as long as the compiled one that it ends in, each token
    anew.
    """
    if isinstance(tokenizer, TextTokenizer):
        return partial(tokenizer.backend.decode, skip_special_tokens=True)
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    ways = type(tokenizer).decode, getattr(type(tokenizer), "_decode", None)
    decode: Callable[..., Any] = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    if ways == (PreTrainedTokenizerBase.decode, PreTrainedTokenizerFast._decode):
        decode = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.decode
    return partial(decode, skip_special_tokens=True)
