"""Which exit layer and draft length are fastest on given prompts: predicted for a grid from one pass, then measured.

The pass writes every prompt's text once and notes what each exit would have drafted (`trajectories.py`). Rounds are
replayed, and take what their calls cost on this machine (`decoding/costs.py`) and what a few real runs show beyond that
(`prediction.py`). The best settings are then run for real, or with `exhaustive` all of them; then the best of all once
more, since the fastest of so many noisy figures is partly the luckiest.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerskip.decoding.adaptive.costs import Costs
from layerskip.errors import InvalidArgumentError, PromptError
from layerskip.evaluation.data.datasets import Example
from layerskip.evaluation.left_out import find_left_out, left_out_key
from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.files import write_csv
from layerskip.evaluation.sweep.prediction import (
    MOST_TRIED_SETTINGS,
    RoundTime,
    SweepRow,
    fit_round_time,
    predict,
    settings_to_try,
    timed_run,
)
from layerskip.evaluation.sweep.trajectories import Trajectory
from layerskip.evaluation.sweep.worker import (
    AUTOREGRESSIVE,
    COSTS,
    FINAL,
    RUN,
    TEXT,
    TRIAL,
    SweepWork,
    from_sample,
    run_key,
    text_key,
)
from layerskip.workers.fan_out import Mapper, in_process

TOP = 3
"""Predicted settings that are run for real, and measured ones of a whole grid that are run once more."""
MOST_TRIED_PROMPTS = 4
"""Prompts decoded for real before anything is predicted."""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Every setting of the grid, and the best one."""

    rows: list[SweepRow]
    best: SweepRow
    """The fastest of those that were measured; of a whole grid, when the best of it were run once more."""
    autoregressive_tokens_per_second: float
    prediction_error: float
    """Mean of |predicted / measured - 1| over the settings that were measured."""
    agreement: dict[int, float]
    """By exit: share of tokens that it would have drafted right."""
    seconds: dict[str, float]
    """What the pass (with costs and trials) and the measurements took, as far as they weren't finished before."""
    left_out: list[dict[str, Any]]
    """Prompts that leave no room for an answer: `index` and `reason`."""


def make_grid(exits: Iterable[int], lengths: Iterable[int], num_layers: int) -> list[Setting]:
    """All pairs of exits and draft lengths.

    Raises:
        InvalidArgumentError: An empty range, or an exit that can't draft.
    """
    exits, lengths = sorted(set(exits)), sorted(set(lengths))
    if not exits or not lengths:
        raise InvalidArgumentError("the grid is empty; first must not be above last, and steps are at least 1")
    for exit_layer in exits:
        if not 1 <= exit_layer < num_layers:
            raise InvalidArgumentError(f"exit layer {exit_layer} can't draft; use 1 to {num_layers - 1}")
    if lengths[0] < 1:
        raise InvalidArgumentError(f"num_speculations must be at least 1, got {lengths[0]}")
    return [Setting(exit_layer, length) for exit_layer in exits for length in lengths]


def _planned_units(num_examples: int, grid: Sequence[Setting], *, exhaustive: bool) -> int:
    """Units of work in all: prompts decoded once."""
    best = min(TOP, len(grid))
    measured = len(grid) + 1 + best if exhaustive else best  # and decoding without drafts, whenever settings are run
    return num_examples * (2 + measured) + _planned_trials(num_examples)


def _planned_trials(num_examples: int) -> int:
    return min(MOST_TRIED_PROMPTS, num_examples) * MOST_TRIED_SETTINGS


def sweep(
    work: SweepWork,
    examples: Sequence[Example],
    grid: Sequence[Setting],
    run: RunFolder,
    *,
    exhaustive: bool = False,
    mapper: Mapper = in_process,
    on_progress: Progress = ignore_progress,
) -> SweepReport:
    """Predict the speed of every setting, and measure the best, or all.

    Args:
        work: How.
        examples: Prompts.
        grid: From `make_grid`.
        run: Keeps every finished sample; `sweep.csv` is written there as results come.
        exhaustive: Run the whole grid.
        mapper: Where the work is done.
        on_progress: Told of every prompt that was decoded once.

    Raises:
        InvalidArgumentError: The config samples: guesses along a sampled text depend on noise.
        PromptError: A prompt that leaves no room, or texts that all end with their first token.
    """
    if work.config.samples:
        raise InvalidArgumentError("a sweep decodes greedily: leave temperature, top-k, top-p and min-p out")
    meter = Meter(on_progress, _planned_units(len(examples), grid, exhaustive=exhaustive))
    steps = _Steps(work=work, examples=examples, grid=grid, run=run, mapper=mapper, meter=meter)
    started = time.perf_counter()
    trajectories, left_out = steps.follow()
    kept = [example for example in examples if left_out_key(example) not in run.samples]
    steps = replace(steps, examples=kept)
    costs = steps.time_calls(trajectories)
    predicted = predict(trajectories, grid, costs, steps.try_rounds(trajectories, costs))
    write_csv(run.path, predicted)
    middle = time.perf_counter()
    rows = steps.measure(
        RUN, list(grid) if exhaustive else _fastest(predicted, "predicted_tokens_per_second"), predicted
    )
    kind, best = RUN, rows
    if exhaustive:
        kind, best = FINAL, steps.measure(FINAL, _fastest(rows, "tokens_per_second"), predicted)
    seconds = {"pass": middle - started, "measurements": time.perf_counter() - middle}
    plain = steps.total(kind, AUTOREGRESSIVE, kept)
    return _report(trajectories, rows, best, plain["tokens"] / plain["seconds"], seconds, left_out)


def _fastest(rows: Sequence[SweepRow], by: str) -> list[Setting]:
    """The `TOP` settings by a column of tokens/s."""
    return [row.setting for row in sorted(rows, key=lambda row: getattr(row, by) or 0.0, reverse=True)[:TOP]]


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """The parts of a sweep; each leaves out what the run's folder has."""

    work: SweepWork
    examples: Sequence[Example]
    grid: Sequence[Setting]
    run: RunFolder
    mapper: Mapper
    meter: Meter

    def follow(self) -> tuple[list[Trajectory], list[dict[str, Any]]]:
        """The pass: every prompt's text, and the exits' agreement with it; and the prompts that were left out."""
        samples = self.run.samples
        there = [{text_key(example), left_out_key(example)} & samples.keys() for example in self.examples]
        missing = [(TEXT, example) for example, keys in zip(self.examples, there, strict=True) if not keys]
        self.meter.advance("one pass", len(self.examples) - len(missing))
        for key, sample in self.mapper(missing, self.work.start):
            self.run.add(key, sample)
            self.meter.advance("one pass", 1)
        kept, left_out = find_left_out(self.examples, self.run.samples)
        trajectories = [from_sample(self.run.samples[text_key(example)]) for example in kept]
        if all(len(trajectory.token_ids) < 2 for trajectory in trajectories):
            raise PromptError(
                "every text ends with its first token, so that there is nothing to draft; use other prompts, more than "
                "one new token (max_new_tokens), or write on after an end-of-sequence token (ignore_eos)"
            )
        return trajectories, left_out

    def time_calls(self, trajectories: Sequence[Trajectory]) -> Costs:
        """Costs in the middle of the texts, for as many drafts as the grid has."""
        if COSTS not in self.run.samples:
            lengths = [t.prompt_tokens + len(t.token_ids) // 2 for t in trajectories]
            most_drafts = max(length for _, length in self.grid)
            for key, sample in self.mapper([(COSTS, sum(lengths) // len(lengths), most_drafts)], self.work.start):
                self.run.add(key, sample)
        return Costs.from_json({name: value for name, value in self.run.samples[COSTS].items() if name != "key"})

    def try_rounds(self, trajectories: Sequence[Trajectory], costs: Costs) -> RoundTime:
        """Decode some prompts for real with a few settings, to learn what a round takes beyond its calls."""
        settings = settings_to_try(trajectories, self.grid, costs)
        count = min(MOST_TRIED_PROMPTS, len(self.examples))
        places = [i * len(self.examples) // count for i in range(count)]
        tried = [self.examples[place] for place in places]
        self._decode(TRIAL, tried, settings, "trying rounds", _planned_trials(len(self.examples)))
        runs = []
        for example, place in zip(tried, places, strict=True):
            for setting in settings:
                sample = self.run.samples[run_key(TRIAL, example, setting)]
                seconds = sample["seconds"] - sample["prompt_seconds"]
                runs.append(timed_run(trajectories[place], setting, costs, seconds))
        return fit_round_time(runs)

    def measure(self, kind: str, settings: Sequence[Setting], predicted: Sequence[SweepRow]) -> list[SweepRow]:
        """Run settings on all prompts; returns the rows with what was measured."""
        turn = [AUTOREGRESSIVE, *settings]

        def write(done: Sequence[Example]) -> None:
            if kind == RUN:
                write_csv(self.run.path, self._with_measured(kind, predicted, settings, done))

        what = "measuring" if kind == RUN else "the best once more"
        self._decode(kind, self.examples, turn, what, len(self.examples) * len(turn), write)
        return self._with_measured(kind, predicted, settings, self.examples)

    def total(self, kind: str, setting: Setting, examples: Sequence[Example]) -> dict[str, float]:
        """Sums of a setting's figures."""
        samples = [self.run.samples[run_key(kind, example, setting)] for example in examples]
        return {name: sum(sample[name] for sample in samples) for name in ("tokens", "seconds", "drafted", "accepted")}

    def _decode(
        self,
        kind: str,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        what: str,
        planned: int,
        on_prompt: Callable[[Sequence[Example]], None] = lambda done: None,
    ) -> None:
        """All settings on all prompts, as far as they are missing; calls back whenever a prompt has all of them."""
        samples = self.run.samples
        left = {e.index: [s for s in settings if run_key(kind, e, s) not in samples] for e in examples}
        missing = [(kind, example, left[example.index]) for example in examples if left[example.index]]
        waiting = {index: len(settings_left) for index, settings_left in left.items()}
        self.meter.advance(what, planned - sum(waiting.values()))
        for key, sample in self.mapper(missing, self.work.start):
            self.run.add(key, sample)
            self.meter.advance(what, 1)
            waiting[sample["index"]] -= 1
            if waiting[sample["index"]] == 0:
                on_prompt([example for example in examples if waiting[example.index] == 0])

    def _with_measured(
        self, kind: str, predicted: Sequence[SweepRow], settings: Sequence[Setting], examples: Sequence[Example]
    ) -> list[SweepRow]:
        chosen = set(settings)
        return [
            row.with_measured(self.total(kind, row.setting, examples)) if row.setting in chosen else row
            for row in predicted
        ]


def _report(
    trajectories: Sequence[Trajectory],
    rows: list[SweepRow],
    best: Sequence[SweepRow],
    plain: float,
    seconds: dict[str, float],
    left_out: list[dict[str, Any]],
) -> SweepReport:
    measured = [row for row in rows if row.tokens_per_second is not None]
    errors = [
        abs(row.predicted_tokens_per_second / row.tokens_per_second - 1)
        for row in measured
        if row.predicted_tokens_per_second is not None and row.tokens_per_second is not None
    ]
    written = sum(len(trajectory.token_ids) for trajectory in trajectories)
    exits = trajectories[0].agreement
    return SweepReport(
        rows=rows,
        best=max(best, key=lambda row: row.tokens_per_second or 0.0),
        autoregressive_tokens_per_second=plain,
        prediction_error=sum(errors) / len(errors),
        agreement={exit_: sum(sum(t.agreement[exit_]) for t in trajectories) / written for exit_ in exits},
        seconds=seconds,
        left_out=left_out,
    )
