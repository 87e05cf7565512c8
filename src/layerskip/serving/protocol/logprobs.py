"""Log-probabilities in the shapes of OpenAI's two APIs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from layerskip.decoding.rules.logprobs import TokenLogprobs

LEAST = -9999.0
"""JSON has no infinity."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text, special tokens included."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


class CompletionLogprobs:
    """Log-probabilities of one text, in the shape of `/v1/completions`, as they come."""

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        """Begin before the first token; `num_top` None: nothing is asked for."""
        self._tokenizer, self._num_top, self._offset = tokenizer, num_top, 0
        self._new: dict[str, list[Any]] = {}

    def add(self, tokens: Sequence[int], logprobs: "Sequence[TokenLogprobs | None]") -> None:
        """Add tokens."""
        if self._num_top is None:
            return
        for token, found in zip(tokens, logprobs, strict=True):
            text = token_text(self._tokenizer, token)
            values: dict[str, Any] = {
                "tokens": text,
                "token_logprobs": None if found is None else max(found.logprob, LEAST),
                "top_logprobs": None if found is None else self._top(token, found),
                "text_offset": self._offset,
            }
            for name, value in values.items():
                self._new.setdefault(name, []).append(value)
            self._offset += len(text)

    def take(self) -> dict[str, Any] | None:
        """What was added since the last call."""
        if self._num_top is None:
            return None
        new, self._new = self._new, {}
        return new or None

    def _top(self, token: int, found: "TokenLogprobs") -> dict[str, float]:
        """The likeliest tokens and the one that was chosen, by their texts; the likelier of two with one text."""
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.logprob)):
            top.setdefault(token_text(self._tokenizer, other), max(logprob, LEAST))
        return top


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], logprobs: "Sequence[TokenLogprobs]") -> dict[str, Any]:
    """In the shape of chats: an entry for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}

    content = [
        {**entry(token, found.logprob), "top_logprobs": [entry(*other) for other in found.top]}
        for token, found in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}
