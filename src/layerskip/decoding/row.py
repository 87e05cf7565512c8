"""One request in the engine: its tokens so far, and what they cost."""

from dataclasses import dataclass, field
from typing import Literal

from layerskip.decoding.ngram import NgramIndex
from layerskip.decoding.request import Request
from layerskip.decoding.stats import StatsRecorder

HISTORY_DECAY = 0.9
"""Weight that a round's drafts keep with each round that follows."""
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(kw_only=True, eq=False)
class Row:
    """One request and what was generated for it."""

    request: Request
    tokens: list[int]
    """Prompt and output; once the prompt is read, the last token has no keys and values yet."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The token or text that ended it, where the reason is `stop`."""
    round_start: int = 0
    """Length of `tokens` before the last step."""
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    history: tuple[float, float] = (0.0, 0.0)
    """Latest drafts by early layers: accepted ones, and all up to the first that wasn't; older ones weigh less."""
    _ngrams: NgramIndex | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.prompt_length + self.request.max_new_tokens - len(self.tokens)

    @property
    def ngrams(self) -> NgramIndex:
        """Runs of tokens in the sequence so far; made when first asked for."""
        self._ngrams = self._ngrams or NgramIndex()
        self._ngrams.extend(self.tokens[len(self._ngrams) :])
        return self._ngrams

    def append(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Extend the row, up to a token that ends it or to its limit; returns the tokens that were kept."""
        ends = self.request.eos_token_ids
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[: stop + 1]
        self.round_start = len(self.tokens)
        self.tokens += kept
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", kept[-1]
        elif self.remaining == 0:
            self.finish_reason = "length"
        return kept

    def remember(self, num_accepted: int, num_drafts: int) -> None:
        """Note a round's drafts by early layers; without any, what is known of earlier ones grows old."""
        accepted, tried = (HISTORY_DECAY * number for number in self.history)
        self.history = accepted + num_accepted, tried + min(num_accepted + 1, num_drafts)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens of the output."""
        self.recorder.cut_round(self.prompt_length + length - self.round_start)
        del self.tokens[self.prompt_length + length :]
