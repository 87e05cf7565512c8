"""What a generation cost and what its drafts were worth."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Figures of one prompt's generation; in a batch, times and layer calls are those of the batch while it ran."""

    tokens: int
    """Tokens written, an end-of-sequence token included."""
    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """Tokens of the prompt whose keys and values were cached already."""
    seconds: float
    """From the start to this prompt's last token."""
    time_to_first_token_s: float
    """Seconds from the start to this prompt's first token."""
    tokens_per_second: float
    """tokens / seconds, the reading of the prompt included."""
    rounds: int
    """Steps after the prompt: drafted rounds, or single tokens."""
    drafted: int
    """Drafts proposed."""
    accepted: int
    """Drafts that became part of the text."""
    acceptance_rate: float
    """accepted / drafted, 0 without drafts."""
    drafted_by_position: tuple[int, ...]
    """Drafts proposed as the first, second, ... of a round."""
    accepted_by_position: tuple[int, ...]
    """Drafts accepted as the first, second, ... of a round."""
    drafted_by: dict[str, int]
    """Drafts proposed by each drafter: `early_exit`, `exit_adapter`, `ngram` or `grammar` (tokens that a constraint
    left no choice of); those that proposed none are left out."""
    accepted_by: dict[str, int]
    """Drafts of each drafter that became part of the text."""
    mean_accepted_length: float
    """Tokens that a round adds: its accepted drafts and the target's own one; 0 without rounds."""
    layer_calls: int
    """Layers entered, each counted once a call whatever its rows and tokens."""
    seconds_drafting: float
    """Seconds in the layers and heads that draft."""
    seconds_verifying: float
    """Seconds in the remaining layers, the head over the drafts, and acceptance."""


@dataclass(kw_only=True)
class RoundRecord:
    """A round whose tokens may turn out not to belong to the text."""

    start: int
    """Tokens of the row before it."""
    accepted: int
    """Drafts that are part of the text."""
    drafter: str | None
    certain: Sequence[bool]
    """As for `StatsRecorder.record_round`."""


@dataclass(kw_only=True)
class StatsRecorder:
    """Counts one row's generation as it goes."""

    started: float = field(default_factory=time.perf_counter)
    cached_tokens: int = 0
    rounds: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
    latest: list["RoundRecord"] = field(default_factory=list)
    """Rounds of the last step of the engine."""
    layer_calls: int = 0
    seconds_drafting: float = 0.0
    seconds_verifying: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def start(self) -> None:
        """Note the time at which work begins."""
        self.started = time.perf_counter()

    def record_tokens(self) -> None:
        """Note the time at which tokens were committed."""
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at

    def begin_step(self, layer_calls: int) -> None:
        """Count the layers that a step of the engine has entered; what earlier steps have given is part of the text."""
        self.latest = []
        self.layer_calls += layer_calls

    def record_round(
        self,
        num_drafts: int,
        num_accepted: int,
        drafter: str | None = None,
        certain: Sequence[bool] = (),
        *,
        start: int = 0,
    ) -> None:
        """Count a round.

        Args:
            num_drafts: Drafts that were verified.
            num_accepted: Those that became part of the text.
            drafter: What proposed them.
            certain: For each draft whether a constraint forced it, where some were.
            start: Tokens of the row before the round.
        """
        self.rounds += 1
        if not num_drafts:
            return
        self.latest.append(RoundRecord(start=start, accepted=num_accepted, drafter=drafter, certain=certain))
        forced = sum(certain[:num_drafts]), sum(certain[:num_accepted])
        free = num_drafts - forced[0], num_accepted - forced[1]
        for name, (drafted, accepted) in ((drafter, free), ("grammar", forced)):
            if name is not None and drafted:
                self.drafted_by[name] = self.drafted_by.get(name, 0) + drafted
                self.accepted_by[name] = self.accepted_by.get(name, 0) + accepted
        missing = num_drafts - len(self.drafted_by_position)
        self.drafted_by_position += [0] * missing
        self.accepted_by_position += [0] * missing
        for position in range(num_drafts):
            self.drafted_by_position[position] += 1
        for position in range(num_accepted):
            self.accepted_by_position[position] += 1

    def cut(self, length: int) -> None:
        """Of the last step's drafts, count only those among the first `length` tokens of the row: it was cut there."""
        for record in self.latest:
            kept = min(record.accepted, max(0, length - record.start))
            for position in range(kept, record.accepted):
                self.accepted_by_position[position] -= 1
                certain = position < len(record.certain) and record.certain[position]
                name = "grammar" if certain else record.drafter
                if name is not None:
                    self.accepted_by[name] -= 1
            record.accepted = kept

    def finish(self, prompt_tokens: int, tokens: int) -> GenerationStats:
        """The figures so far."""
        seconds = (self.last_token_at or time.perf_counter()) - self.started
        drafted, accepted = sum(self.drafted_by_position), sum(self.accepted_by_position)
        return GenerationStats(
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.cached_tokens,
            seconds=seconds,
            time_to_first_token_s=(self.first_token_at or self.started) - self.started,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            rounds=self.rounds,
            drafted=drafted,
            accepted=accepted,
            acceptance_rate=accepted / drafted if drafted else 0.0,
            drafted_by_position=tuple(self.drafted_by_position),
            accepted_by_position=tuple(self.accepted_by_position),
            drafted_by=dict(self.drafted_by),
            accepted_by=dict(self.accepted_by),
            mean_accepted_length=(tokens - 1) / self.rounds if self.rounds else 0.0,
            layer_calls=self.layer_calls,
            seconds_drafting=self.seconds_drafting,
            seconds_verifying=self.seconds_verifying,
        )
