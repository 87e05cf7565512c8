"""How often adaptive decoding re-evaluates the alternatives it is not using: other exits, drafting, plain steps."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median

from layerskip.decoding.policy import Plan

MOST_REST = 64
"""Plain steps between two evaluations of the alternatives, at most; the number grows from a small one."""
FIRST_REST = 8
"""Plain steps that a generation begins with at most, where the last one ended with plain steps."""
LOOK_SHARE = 0.005
"""Share of all time that evaluations may take: planning, and a step that finds the caches cold after it."""
CALL_SECONDS = 0.03
"""A call with several steps ends after this time anyway (`engine.LEASE_SECONDS`), so that the next one costs nothing
more where alternatives are evaluated then."""
LOOK_WEIGHT = 0.2
"""Weight of the latest evaluation's time: single ones vary by more than they take."""
STEPS_EVERY = 192
"""Rounds with drafts after which a few plain steps are timed: what drafting is compared with."""
COLD_STEPS, TIMED_STEPS = 2, 4
"""Plain steps after a round with drafts: the first two run with cold caches and are not timed, the next four are."""
COLD_ROUNDS = 2
"""Rounds with drafts after plain steps that are not timed, for the same reason."""
TRIAL_ROUNDS = 8
"""Rounds of a trial: drafting goes on for this long although plain steps are expected to be faster."""
TRIAL_ROUNDS_OF_SEVERAL = 5
"""The same of several rows, each round of which says more."""
TRIAL_TOKENS = 1.5
"""Tokens that a round of a trial is expected to bring."""
TEXT_STEPS = 2.0
"""Plain steps that the first trial on a new text may lose besides: how well early layers draft differs by text, and a
short one would be over before a trial is due. It takes place where drafting comes near to plain steps."""
TRIAL_SHARE = 0.0075
"""Share of all time that trials may lose."""
PROBE_SHARE = 0.004
"""Share of all time that probes may take."""
FIRST_PROBE_SHARE = 0.005
"""The same while too little is known of the exits."""
MEASURING_SHARE = 0.01
"""Share of all time that timing the network's calls may take, until all costs are known."""


@dataclass(kw_only=True)
class Pace:
    """Counts of rounds and seconds since the alternatives were evaluated, for batches of one kind and size."""

    trial_rounds: int = TRIAL_ROUNDS
    """Rounds of a trial."""
    probe_seconds: float = 0.0
    """Seconds that the last probe took beyond those of its round."""
    since_probe: float = 0.0
    """Seconds since the last probe."""
    since_steps: int = 0
    """Rounds with drafts since plain steps were timed."""
    since_trial: float = 0.0
    """Seconds since drafting was tried."""
    trial: int = 0
    """Rounds that are left of a trial."""
    seconds: float = 0.0
    """Seconds of all steps and rounds."""
    measuring_seconds: float = 0.0
    """Seconds that timing calls took."""

    best: tuple[Hashable, Plan | None] | None = None
    """The best exit and its drafts, and what they are for; None once more is known of drafts."""
    look_seconds: float | None = None
    """Seconds of an evaluation, smoothed, with those of a call that begins because of it; less than none where the
    steps before it were slow."""
    is_new_text: bool = False
    """Whether the sequences are new, and early layers haven't been tried on them."""
    planning_seconds: float = 0.0
    """Seconds of an evaluation alone, smoothed."""
    rest: int = 0
    """Plain steps that were last planned at once; the next time, if nothing comes between, there are more."""

    def begin_text(self) -> None:
        """Other sequences begin: with few plain steps at once, and early layers may be tried on them sooner."""
        self.rest, self.is_new_text = min(FIRST_REST, self.rest), True

    def observe_look(self, planning: float, beside: float) -> None:
        """Note what an evaluation took, and what the first step after it took longer than others, in seconds."""
        seconds = planning + beside
        if self.look_seconds is None:
            self.look_seconds, self.planning_seconds = seconds, planning
        self.look_seconds += LOOK_WEIGHT * (seconds - self.look_seconds)
        self.planning_seconds += LOOK_WEIGHT * (planning - self.planning_seconds)

    def next_rest(self, step_seconds: float) -> int:
        """Plain steps to plan at once, since they are best; a step takes `step_seconds`."""
        share = LOOK_SHARE * step_seconds
        enough = (self.look_seconds or 0.0) / share
        whole_call = max(CALL_SECONDS / step_seconds, self.planning_seconds / share)
        self.rest = int(min(MOST_REST, max(2, 2 * self.rest), max(2, min(enough, whole_call))))
        return self.rest

    def observe_drafts(self, seconds: float, *, layers: bool) -> None:
        """Note a round with drafts, of early layers or not; trials aside, few plain steps follow at once."""
        if not (layers and self.trial):
            self.rest = 0
        self.since_steps += 1
        if layers:
            self.since_trial, self.trial = 0.0, max(0, self.trial - 1)
            self.is_new_text = False
        else:
            self.since_trial += seconds
        self.since_probe += seconds
        self.seconds += seconds

    def observe_steps(self, seconds: Sequence[float]) -> float | None:
        """Note plain steps in a row; returns the seconds of one, if there were enough to tell."""
        self.since_trial += sum(seconds)
        self.since_probe += sum(seconds)
        self.seconds += sum(seconds)
        if len(seconds) < COLD_STEPS + TIMED_STEPS:
            return None
        self.since_steps = 0
        return median(seconds[COLD_STEPS:])

    @property
    def steps_are_due(self) -> bool:
        """Whether plain steps haven't been timed for long."""
        return self.since_steps >= STEPS_EVERY

    def tries(self, step_seconds: float, gain: float) -> bool:
        """Whether early layers draft although that isn't expected to gain: the nearer it comes, the more often.

        What is known of them grows old, and nothing new is learned while they aren't used.

        Args:
            step_seconds: Expected seconds of a plain step.
            gain: Expected speed of drafting, as a ratio to that of plain steps.
        """
        lost_steps = COLD_STEPS / 2 + self.trial_rounds * TRIAL_TOKENS * max(0.0, 1.0 / gain - 1.0)
        allowed = self.since_trial * TRIAL_SHARE + (TEXT_STEPS * step_seconds if self.is_new_text else 0.0)
        if not self.trial and allowed > lost_steps * step_seconds:
            self.trial, self.since_trial, self.is_new_text = self.trial_rounds, 0.0, False
        return self.trial > 0

    def observe_probe(self, seconds: float) -> None:
        """Note the seconds that a probe took beyond those of its round."""
        self.probe_seconds, self.since_probe = seconds, 0.0

    def probe_is_due(self, expected_seconds: float, *, first: bool) -> bool:
        """Whether probes have taken less than their share of the time.

        Args:
            expected_seconds: What a probe is expected to take, where none was timed yet.
            first: Whether too little is known of the exits.
        """
        share = FIRST_PROBE_SHARE if first else PROBE_SHARE
        return self.since_probe * share > (self.probe_seconds or expected_seconds)

    @property
    def measuring_budget(self) -> float:
        """Seconds that timing calls may take now."""
        return MEASURING_SHARE * self.seconds - self.measuring_seconds
