"""How often adaptive decoding looks at what it doesn't use at present: other exits, drafting, steps without drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MOST_REST = 64
"""Steps without drafts from one look at the alternatives to the next, at most; at first fewer."""
FIRST_REST = 16
"""Most such steps at the start of a text, where the last one ended with them."""
LOOK_SHARE = 0.005
"""Time that such looks may take, of all: planning, and a step that finds the caches cold after it."""
STEPS_EVERY = 192
"""Rounds with drafts after which a few steps without are timed: what drafting is held against."""
COLD_STEPS, TIMED_STEPS = 2, 4
"""Steps after anything else that aren't timed, for their code and data have left the caches, and those that are."""
PROBE_SHARE = 0.0075
"""Time that probes may take, of all."""


@dataclass(kw_only=True)
class Pace:
    """Counts of rounds and seconds since each of these, for batches of one kind."""

    probe_seconds: float = 0.0
    """What the last probe took beyond what its round would have taken."""
    since_probe: float = 0.0
    """Seconds since then."""
    since_steps: int = 0
    """Rounds with drafts since steps without were timed."""

    rest: int = 0
    """Steps that the last rest took; the next one, if nothing comes between, takes more."""

    def lengthen_rest(self, look_seconds: float, step_seconds: float) -> int:
        """Steps without drafts to take now, since they are best, given what a look at the alternatives took."""
        enough = look_seconds / (LOOK_SHARE * step_seconds)
        self.rest = int(min(MOST_REST, max(2, 2 * self.rest), max(1, enough)))
        return self.rest

    def observe_drafts(self, seconds: float) -> None:
        """Note a round with drafts: what follows is no rest."""
        self.rest = 0
        self.since_steps += 1
        self.since_probe += seconds

    def observe_steps(self, seconds: Sequence[float]) -> float | None:
        """Note steps in a row; returns what one takes, in seconds, if they were enough to tell."""
        self.since_probe += sum(seconds)
        if len(seconds) < COLD_STEPS + TIMED_STEPS:
            return None
        self.since_steps = 0
        return fmean(seconds[COLD_STEPS:])

    @property
    def steps_are_due(self) -> bool:
        """Whether it is long since steps were timed."""
        return self.since_steps >= STEPS_EVERY

    def observe_probe(self, seconds: float) -> None:
        """Note what a probe took beyond its round."""
        self.probe_seconds, self.since_probe = seconds, 0.0

    def probe_is_due(self, step_seconds: float) -> bool:
        """Whether probes have taken less than their share of the time."""
        return self.since_probe * PROBE_SHARE > max(self.probe_seconds, step_seconds / 4)
