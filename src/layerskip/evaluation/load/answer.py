"""One answer, as its chunks arrive: its text, when each piece came, and what the server says of it.

A chunk may hold several tokens, above all where the server speculates. The number in each is known where the server
tells it: by usage in every chunk (vLLM's `continuous_usage_stats`), by our `speculation` field, or because there are
as many pieces as tokens.
"""

from typing import Any

from layerskip.files import parse_json

DONE = "[DONE]"
TEXT_FIELDS = ("content", "reasoning_content", "reasoning")
"""Fields of a chat's delta that hold text."""


class AnswerError(Exception):
    """A request that wasn't answered in full; its `kind` says how, for counting."""

    def __init__(self, kind: str, message: str, *, retry_after: float | None = None) -> None:
        """An error.

        Args:
            kind: A few words without details, such as HTTP 503.
            message: What is known, in a line.
            retry_after: Seconds after which the server wants to be asked again, if it said so.
        """
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class Answer:
    """What has arrived of an answer."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.text = ""
        self.times: list[float] = []
        """Seconds after the request was sent at which each piece of text came."""
        self.usage: dict[str, Any] = {}
        self.speculation: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.done = False
        self._counts: list[int] = []
        """Tokens in each piece, as far as chunks say so."""
        self._unseen = 0
        """Tokens of chunks without text since the last piece."""
        self._counted = 0
        """Tokens so far, where every chunk tells."""

    def take(self, data: str, seconds: float) -> None:
        """Take an event's data.

        Args:
            data: A chunk as JSON, or the mark of the end.
            seconds: When it arrived, after the request was sent.

        Raises:
            AnswerError: It is neither, or the server reports an error.
        """
        if data.strip() == DONE:
            self.done = True
            return
        try:
            chunk = parse_json(data)
        except ValueError as error:
            raise AnswerError("unreadable stream", f"a chunk isn't JSON: {error}: {data[:80]!r}") from None
        if not isinstance(chunk, dict):
            raise AnswerError("unreadable stream", f"a chunk isn't an object: {data[:80]!r}")
        if chunk.get("error"):
            raise AnswerError("error in the stream", error_message(chunk) or str(chunk["error"]))
        text = self._read_choice(chunk)
        self._read_counts(chunk, has_text=bool(text))
        if text:
            self.text += text
            self.times.append(seconds)
        metrics = chunk.get("metrics")
        if isinstance(metrics, dict) and isinstance(metrics.get("speculative_decoding"), dict):
            self.speculation = metrics["speculative_decoding"]

    def _read_choice(self, chunk: dict[str, Any]) -> str:
        """The text in a chunk."""
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ""
        choice = choices[0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta")
        if isinstance(delta, dict):
            parts = [delta.get(name) for name in TEXT_FIELDS]
            for call in delta.get("tool_calls") or []:
                function = call.get("function") if isinstance(call, dict) else None
                parts += [function.get("name"), function.get("arguments")] if isinstance(function, dict) else []
            return "".join(part for part in parts if isinstance(part, str))
        text = choice.get("text")
        return text if isinstance(text, str) else ""

    def _read_counts(self, chunk: dict[str, Any], *, has_text: bool) -> None:
        """Count the tokens of a chunk, if it tells; those of chunks without text belong to the next piece."""
        usage, round_ = chunk.get("usage"), chunk.get("speculation")
        gained = 0
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.usage = usage
            gained = usage["completion_tokens"] - self._counted
        if isinstance(round_, dict) and isinstance(round_.get("tokens"), list):
            gained = len(round_["tokens"])
        self._unseen += max(0, gained)
        self._counted += max(0, gained)
        if has_text:
            self._counts.append(self._unseen)
            self._unseen = 0

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the answer as the server counts them; None if it doesn't say."""
        number = self.usage.get("completion_tokens")
        return number if isinstance(number, int) and not isinstance(number, bool) else None

    def tokens_by_piece(self) -> list[int] | None:
        """Tokens in each piece; None where that isn't known."""
        if self._counts and all(self._counts):
            return list(self._counts)
        unseen = (self.num_tokens or 0) - len(self.times)  # an end token is counted, and has no text
        if self.times and (unseen == 0 or (unseen == 1 and self.finish_reason == "stop")):
            return [1] * len(self.times)
        return None


def error_message(body: Any) -> str | None:
    """The message in an error body of OpenAI's shape, or of servers that come near it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return " ".join(error.split())[:300] if isinstance(error, str) and error.strip() else None
