"""One request in the engine: its tokens so far, and what they cost."""

from dataclasses import dataclass, field
from typing import Literal

from layerskip.decoding.ngrams.index import MAX_MATCH, Match, NgramIndex
from layerskip.decoding.ngrams.store import SuffixStore
from layerskip.decoding.request import Request
from layerskip.decoding.rules.guide import Guide
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.decoding.stats import StatsRecorder

HISTORY_DECAY = 0.9
"""Weight that a round's drafts keep with each round that follows."""
FinishReason = Literal["stop", "length", "interrupted", "error"]


@dataclass(kw_only=True, eq=False)
class Row:
    """One request and what was generated for it."""

    request: Request
    tokens: list[int]
    """Prompt and output; once the prompt is read, the last token has no keys and values yet."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The token or text that ended it, where the reason is `stop`; what went wrong, where it is `error`."""
    round_start: int = 0
    """Length of `tokens` before the last round."""
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    guide: Guide | None = None
    """What may be generated, where the request has a constraint."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the output's tokens, where the request asks for them."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """Of the prompt's tokens so far, where the request asks for them; None for the first, which follows nothing."""
    suffixes: SuffixStore | None = None
    """Texts of other requests."""
    history: tuple[float, float] = (0.0, 0.0)
    """Latest drafts by early layers: accepted ones, and all up to the first that wasn't; older ones weigh less."""
    _ngrams: NgramIndex | None = None
    _found: tuple[tuple[int, int], Match | None] = ((0, 0), None)
    """The latest match, with the number of tokens and the version of the store that it is of."""

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

    def match(self) -> Match | None:
        """What followed the last tokens before: in the sequence itself, or where they repeat for longer in others."""
        own = self.ngrams.match()
        if self.suffixes is None:
            return own
        moment = len(self.tokens), self.suffixes.version
        if self._found[0] != moment:
            foreign = self.suffixes.match(self.tokens, beyond=0 if own is None else own.length)
            self._found = moment, foreign or own
        return self._found[1]

    @property
    def legacy(self) -> list[int]:
        """What others may draft from: the output, and before it the end of the prompt, by which they find it."""
        return self.tokens[max(0, self.prompt_length - MAX_MATCH) :] if self.output else []

    def append(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Extend the row, up to a token that ends it or to its limit; returns the tokens that were kept."""
        ends = self.request.eos_token_ids
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[: stop + 1]
        self.round_start = len(self.tokens)
        if self.guide is not None:
            kept = kept[: self.guide.take(kept)]
        self.tokens += kept
        after = self.guide.at() if self.guide is not None else None
        if stop is not None and stop < len(kept):
            self.finish_reason, self.stop_reason = "stop", kept[-1]
        elif after is not None and after.complete:
            self.finish_reason = "stop"
        elif self.remaining == 0:
            self.finish_reason = "length"
        elif after is not None and after.error is not None:
            self.fail(after.error)
        return kept

    def fail(self, why: str) -> None:
        """End the row, because its constraint can't be kept."""
        self.finish_reason, self.stop_reason = "error", why

    def remember(self, num_accepted: int, num_drafts: int) -> None:
        """Note a round's drafts by early layers; without any, what is known of earlier ones grows old."""
        accepted, tried = (HISTORY_DECAY * number for number in self.history)
        self.history = accepted + num_accepted, tried + min(num_accepted + 1, num_drafts)

    def grow_old(self, rounds: int) -> None:
        """Note rounds without drafts: what is known of earlier ones counts less."""
        kept = HISTORY_DECAY**rounds
        self.history = kept * self.history[0], kept * self.history[1]

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens of the output."""
        self.recorder.cut(self.prompt_length + length)
        del self.tokens[self.prompt_length + length :]
        del self.logprobs[length:]
