"""Text out of tokens, as they come: detokenisation that never shows half a character, and stop strings."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that aren't a whole character."""
PROMPT_TAIL = 6
"""Tokens of the prompt that give the first new ones their context (a leading space, a started character)."""


class Detokenizer:
    """Turns one row's tokens into text piece by piece.

    A piece is the text that a token adds to what the tokens just before it read; while that ends in the middle of a
    character, nothing is given.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> None:
        """Start after a prompt.

        Args:
            tokenizer: The checkpoint's tokenizer.
            prompt: Token ids of the prompt; only its end is used.
        """
        self._decode_ids = _decoder(tokenizer)
        self._tokens = list(prompt[-PROMPT_TAIL:])
        self._context = 0  # tokens from here on are read together with the new ones
        self._shown = len(self._tokens)  # tokens up to here have been given as text

    def push(self, *tokens: int) -> str:
        """The text that the next tokens complete, possibly none."""
        self._tokens += tokens
        text = self._pending(())
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text

    def peek(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` would add, without adding them."""
        return self._pending(tokens).rstrip(REPLACEMENT)

    def flush(self) -> str:
        """At the end of the text: what was held back, without a character that stayed incomplete."""
        text = self._pending(()).rstrip(REPLACEMENT)
        self._context, self._shown = self._shown, len(self._tokens)
        return text

    def _pending(self, extra: Sequence[int]) -> str:
        known = self._decode(self._tokens[self._context : self._shown])
        text = self._decode([*self._tokens[self._context :], *extra])
        if not text.startswith(known):  # a prompt that ends in the middle of a character, completed by now
            known = known.rstrip(REPLACEMENT)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._decode_ids(list(tokens)) if tokens else ""


def _decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    """Token ids to text, special tokens left out.

    A fast tokenizer's own way there takes several times as long as the compiled one that it ends in, each token anew.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    ways = type(tokenizer).decode, getattr(type(tokenizer), "_decode", None)
    decode: Callable[..., Any] = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    if ways == (PreTrainedTokenizerBase.decode, PreTrainedTokenizerFast._decode):
        decode = tokenizer.backend_tokenizer.decode
    return partial(decode, skip_special_tokens=True)


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add a piece of text.

        Returns:
            The text that is certain now, and the stop string that was found, if any; nothing follows it.
        """
        text = self._held + piece
        found = min(((text.find(stop), stop) for stop in self._stops if stop in text), default=None)
        if found is not None:
            self._held = ""
            return text[: found[0]], found[1]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string was found."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
