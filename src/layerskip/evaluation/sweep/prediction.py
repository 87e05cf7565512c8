"""How fast every exit and draft length would be: rounds are replayed along texts, and take what their calls cost.

A real round takes longer than its calls did when they were timed: there is a loop around them, they find their data in
no cache, and the machine is not always at its best. A few real runs tell how much longer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerskip.decoding.adaptive.costs import Costs
from layerskip.evaluation.sweep.files import SweepRow
from layerskip.evaluation.sweep.trajectories import Replay, Trajectory, replay

Setting = tuple[int, int]
"""Exit layer and draft length."""
MOST_TRIED_SETTINGS = 3


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
        replays = [replay(trajectory, *setting) for trajectory in trajectories]
        calls = sum(calls_of(found, setting[0], costs) for found in replays)
        return calls / max(1, sum(found.rounds.total() for found in replays))

    dear = {setting: calls_per_round(setting) for setting in grid}
    rows = predict(trajectories, grid, costs, RoundTime(factor=1.0, around=costs.step()))
    fastest = max(rows, key=lambda row: row.predicted_tokens_per_second or 0.0)
    found = (min(grid, key=dear.__getitem__), max(grid, key=dear.__getitem__), fastest.setting)
    return list(dict.fromkeys(found))


def timed_run(trajectory: Trajectory, setting: Setting, costs: Costs, seconds: float) -> TimedRun:
    """What `seconds` of decoding a text with a setting, without its prompt, say of a round."""
    replayed = replay(trajectory, *setting)
    return TimedRun(
        calls=calls_of(replayed, setting[0], costs),
        rounds=replayed.rounds.total(),
        seconds=seconds,
    )


def fit_round_time(runs: Iterable[TimedRun]) -> RoundTime:
    """Least squares of relative errors; neither part is below 0."""
    found = [(run.calls / run.seconds, run.rounds / run.seconds) for run in runs if run.rounds and run.seconds > 0]
    if not found:
        return RoundTime(factor=1.0, around=0.0)
    aa, bb = (sum(pair[i] ** 2 for pair in found) for i in (0, 1))
    a, b = (sum(pair[i] for pair in found) for i in (0, 1))
    ab = sum(x * y for x, y in found)
    candidates = [(a / aa, 0.0), (0.0, b / bb)]
    if (determinant := aa * bb - ab * ab) > 1e-9 * aa * bb:  # else all rounds cost the same
        both = ((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant)
        candidates += [both] if min(both) >= 0 else []

    def error(candidate: tuple[float, float]) -> float:
        return sum((candidate[0] * x + candidate[1] * y - 1) ** 2 for x, y in found)

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
    for exit_layer, length in grid:
        replays = [replay(trajectory, exit_layer, length) for trajectory in trajectories]
        calls = sum(calls_of(found, exit_layer, costs) for found in replays)
        seconds = reading + time.factor * calls + time.around * sum(found.rounds.total() for found in replays)
        drafted = sum(found.drafted for found in replays)
        rows.append(
            SweepRow(
                exit_layer=exit_layer,
                num_speculations=length,
                acceptance_rate=sum(found.accepted for found in replays) / max(1, drafted),
                predicted_tokens_per_second=tokens / seconds,
            )
        )
    return rows
