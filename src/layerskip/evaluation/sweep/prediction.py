"""How fast every exit and draft length would be: rounds are replayed along texts, and take what their calls cost.

A real round takes longer than its calls did when they were timed: there is a loop around them, they find their data in
no cache, and the machine is not always at its best. A few real runs tell how much longer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from layerskip.decoding.adaptive.costs import Costs
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.trajectories import Replay, Trajectory, replay

MOST_TRIED_SETTINGS = 3


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One setting; times are None where it wasn't run."""

    exit_layer: int
    num_speculations: int
    acceptance_rate: float
    """Accepted drafts, of all."""
    total_time: float | None = None
    """Seconds for all prompts, reading them included."""
    time_per_token: float | None = None
    """Seconds."""
    tokens_per_second: float | None = None
    predicted_tokens_per_second: float | None = None

    @property
    def setting(self) -> Setting:
        """Exit layer and draft length."""
        return Setting(self.exit_layer, self.num_speculations)

    def with_measured(self, total: Mapping[str, float]) -> "SweepRow":
        """The row with what all prompts took: sums of `tokens`, `seconds`, `drafted` and `accepted`."""
        return replace(
            self,
            acceptance_rate=total["accepted"] / max(1.0, total["drafted"]),
            total_time=total["seconds"],
            time_per_token=total["seconds"] / total["tokens"],
            tokens_per_second=total["tokens"] / total["seconds"],
        )


@dataclass(frozen=True, kw_only=True)
class RoundTime:
    """Seconds of a real round: `factor` x its calls, plus `around`."""

    factor: float
    around: float
    """Seconds."""


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """A text that was decoded for real."""

    calls: float
    """Seconds that its rounds' calls should take."""
    rounds: int
    seconds: float
    """Seconds that it took, without the prompt's."""


def calls_of(replayed: Replay, exit_layer: int, costs: Costs) -> float:
    """Seconds of all calls of a text's rounds."""
    return sum(count * costs.round(exit_layer, drafts) for drafts, count in replayed.rounds.items())


def settings_to_try(trajectories: Sequence[Trajectory], grid: Sequence[Setting], costs: Costs) -> list[Setting]:
    """Settings that tell what a round takes: that of the cheapest rounds, of the dearest, and the fastest."""

    def calls_per_round(setting: Setting) -> float:
        replays = [replay(trajectory, setting) for trajectory in trajectories]
        calls = sum(calls_of(replayed, setting.exit_layer, costs) for replayed in replays)
        return calls / max(1, sum(replayed.rounds.total() for replayed in replays))

    dear = {setting: calls_per_round(setting) for setting in grid}
    rows = predict(trajectories, grid, costs, RoundTime(factor=1.0, around=costs.step()))
    fastest = max(rows, key=lambda row: row.predicted_tokens_per_second or 0.0)
    return list(dict.fromkeys((min(grid, key=dear.__getitem__), max(grid, key=dear.__getitem__), fastest.setting)))


def timed_run(trajectory: Trajectory, setting: Setting, costs: Costs, seconds: float) -> TimedRun:
    """What `seconds` of decoding a text with a setting, without its prompt, say of a round."""
    replayed = replay(trajectory, setting)
    return TimedRun(
        calls=calls_of(replayed, setting.exit_layer, costs),
        rounds=replayed.rounds.total(),
        seconds=seconds,
    )


def fit_round_time(runs: Iterable[TimedRun]) -> RoundTime:
    """Least squares of relative errors; neither part is below 0."""
    pairs = [(run.calls / run.seconds, run.rounds / run.seconds) for run in runs if run.rounds and run.seconds > 0]
    if not pairs:
        return RoundTime(factor=1.0, around=0.0)
    aa, bb = (sum(pair[i] ** 2 for pair in pairs) for i in (0, 1))
    a, b = (sum(pair[i] for pair in pairs) for i in (0, 1))
    ab = sum(x * y for x, y in pairs)
    candidates = [(a / aa, 0.0), (0.0, b / bb)]
    if (determinant := aa * bb - ab * ab) > 1e-9 * aa * bb:  # else all rounds cost the same
        both = ((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant)
        candidates += [both] if min(both) >= 0 else []

    def error(candidate: tuple[float, float]) -> float:
        return sum((candidate[0] * x + candidate[1] * y - 1) ** 2 for x, y in pairs)

    factor, around = min(candidates, key=error)
    return RoundTime(factor=factor, around=around)


def predict(
    trajectories: Sequence[Trajectory], grid: Iterable[Setting], costs: Costs, time: RoundTime
) -> list[SweepRow]:
    """Replay every setting.

    Args:
        trajectories: Texts, and which exits agree with them.
        grid: Settings.
        costs: Seconds of calls.
        time: What a round makes of them.
    """
    reading = sum(t.prompt_seconds for t in trajectories)
    tokens = sum(len(t.token_ids) for t in trajectories)
    rows = []
    for setting in grid:
        replays = [replay(trajectory, setting) for trajectory in trajectories]
        calls = sum(calls_of(replayed, setting.exit_layer, costs) for replayed in replays)
        seconds = reading + time.factor * calls + time.around * sum(replayed.rounds.total() for replayed in replays)
        drafted = sum(replayed.drafted for replayed in replays)
        rows.append(
            SweepRow(
                exit_layer=setting.exit_layer,
                num_speculations=setting.num_speculations,
                acceptance_rate=sum(replayed.accepted for replayed in replays) / max(1, drafted),
                predicted_tokens_per_second=tokens / seconds,
            )
        )
    return rows
