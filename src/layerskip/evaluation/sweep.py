"""Which exit layer and draft length are fastest on given prompts: predicted for a grid from one pass, then measured.

The pass writes every prompt's text once and notes what each exit would have drafted (`trajectories.py`); rounds are
replayed, and each takes what its parts cost on this machine (`decoding/costs.py`). The best settings are then run for
real, or with `exhaustive` all of them.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.costs import MEASURED_QUERIES, Costs, measure_costs
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.datasets import Example, encode_examples
from layerskip.evaluation.fan_out import Mapper, in_process
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.sweep_files import SweepRow, write_csv
from layerskip.evaluation.trajectories import Trajectory, record_trajectory, replay
from layerskip.language_model import LanguageModel

TOP = 3
"""Predicted settings that are run for real."""
TEXT, COSTS, RUN = "text", "costs", "run"
"""Kinds of samples: a prompt's text with the exits' agreement; seconds of calls; a prompt decoded with a setting."""

Setting = tuple[int, int]
"""Exit layer and draft length."""
AUTOREGRESSIVE: Setting = (0, 0)
"""Stands for decoding without drafts, which is measured in turn with the settings."""
Progress = Callable[[str, int], None]
"""Told what is done, and how many units of work were finished."""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Every setting of the grid, and the best one."""

    rows: list[SweepRow]
    best: SweepRow
    """The fastest of those that were measured."""
    autoregressive_tokens_per_second: float
    prediction_error: float
    """Mean of |predicted / measured - 1| over the settings that were measured."""
    agreement: dict[int, float]
    """By exit: share of tokens that it would have drafted right."""
    seconds: dict[str, float]
    """What the pass (with the costs) and the measurements took, as far as they weren't finished before."""


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
    return [(exit_layer, length) for exit_layer in exits for length in lengths]


@dataclass(frozen=True, kw_only=True)
class SweepWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    exits: Sequence[int]
    config: GenerationConfig

    def start(self) -> "SweepWorker":
        """A worker, with its model loaded."""
        return SweepWorker(self)


class SweepWorker:
    """Follows exits along texts, times calls, and decodes with settings."""

    def __init__(self, work: SweepWork) -> None:
        """Load the model."""
        self._work, self._lm = work, work.load()
        self._warm = False

    def __call__(self, item: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and samples of an item: (TEXT, example), (COSTS, context, most drafts), (RUN, example, settings)."""
        match item:
            case ("costs", int(context), int(most)):
                queries = [*(n for n in MEASURED_QUERIES if n <= most), most + 1]
                yield COSTS, asdict(measure_costs(self._lm.decoder, 1, context=context, queries=queries))
            case ("text", Example() as example):
                yield f"{TEXT}/{example.index}", self._follow(example)
            case ("run", Example() as example, list(settings)):
                yield from self._measure(example, settings)

    def _follow(self, example: Example) -> dict[str, Any]:
        lm, work = self._lm, self._work
        (prompt,) = encode_examples(lm, [example], work.config)
        if not self._warm:
            record_trajectory(lm, prompt, work.exits, work.config)
            self._warm = True
        return {"index": example.index, **_to_sample(record_trajectory(lm, prompt, work.exits, work.config))}

    def _measure(self, example: Example, settings: Sequence[Setting]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run settings in turn, for every prompt in another order: a machine's speed drifts."""
        (prompt,) = encode_examples(self._lm, [example], self._work.config)
        order = random.Random(example.index).sample(list(settings), len(settings))
        _decode(self._lm, prompt, order[0], self._work.config)  # warms up
        for setting in order:
            sample = _decode(self._lm, prompt, setting, self._work.config)
            yield _run_key(example, setting), {"index": example.index, **sample}


def sweep(
    work: SweepWork,
    examples: Sequence[Example],
    grid: Sequence[Setting],
    run: RunFolder,
    *,
    exhaustive: bool = False,
    mapper: Mapper = in_process,
    on_progress: Progress = lambda what, done: None,
) -> SweepReport:
    """Predict the speed of every setting, and measure the best, or all.

    Args:
        work: How.
        examples: Prompts.
        grid: From `make_grid`.
        run: Keeps every finished sample; `sweep.csv` is written there as results come.
        exhaustive: Run the whole grid.
        mapper: Where the work is done.
        on_progress: A unit is a prompt decoded once.

    Raises:
        InvalidArgumentError: The config samples: guesses along a sampled text depend on noise.
        PromptError: A prompt that leaves no room.
    """
    if work.config.samples:
        raise InvalidArgumentError("a sweep decodes greedily: leave temperature, top-k, top-p and min-p out")
    started = time.perf_counter()
    trajectories = _record(work, examples, run, mapper, on_progress)
    predicted = predict(trajectories, grid, _costs(work, trajectories, max(length for _, length in grid), run, mapper))
    write_csv(run.path, predicted)
    middle = time.perf_counter()
    ranked = sorted(predicted, key=lambda row: row.predicted_tokens_per_second or 0.0, reverse=True)
    chosen = list(grid) if exhaustive else [(row.exit_layer, row.num_speculations) for row in ranked[:TOP]]
    rows = _measure(work, examples, chosen, predicted, run, mapper, on_progress)
    plain = _total(run, AUTOREGRESSIVE, examples)
    seconds = {"pass": middle - started, "measurements": time.perf_counter() - middle}
    return _report(trajectories, rows, plain["tokens"] / plain["seconds"], seconds)


def predict(trajectories: Sequence[Trajectory], grid: Iterable[Setting], costs: Costs) -> list[SweepRow]:
    """Replay every setting.

    What a step takes beyond its calls (the loop around them) is known from the texts, and is added to each round.
    """
    steps = sum(len(t.token_ids) - 1 for t in trajectories)
    decoding = sum(t.seconds - t.prompt_seconds for t in trajectories)
    around = max(0.0, decoding / steps - costs.step()) if steps else 0.0
    reading = sum(t.prompt_seconds for t in trajectories)
    tokens = sum(len(t.token_ids) for t in trajectories)
    rows = []
    for exit_layer, length in grid:
        replays = [replay(trajectory, exit_layer, length) for trajectory in trajectories]
        rounds = [item for found in replays for item in found.rounds.items()]
        seconds = reading + sum(count * (around + costs.round(exit_layer, drafts)) for drafts, count in rounds)
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


def _costs(
    work: SweepWork, trajectories: Sequence[Trajectory], most_drafts: int, run: RunFolder, mapper: Mapper
) -> Costs:
    """Costs in the middle of the texts, for as many drafts as the grid has; those of an interrupted run stay."""
    if COSTS not in run.samples:
        lengths = [t.prompt_tokens + len(t.token_ids) // 2 for t in trajectories]
        for key, sample in mapper([(COSTS, sum(lengths) // len(lengths), most_drafts)], work.start):
            run.add(key, sample)
    return Costs.from_json({name: value for name, value in run.samples[COSTS].items() if name != "key"})


def _record(
    work: SweepWork, examples: Sequence[Example], run: RunFolder, mapper: Mapper, on_progress: Progress
) -> list[Trajectory]:
    """The pass; texts of an interrupted run are taken from its folder."""
    missing = [(TEXT, example) for example in examples if f"{TEXT}/{example.index}" not in run.samples]
    on_progress("one pass", len(examples) - len(missing))
    for key, sample in mapper(missing, work.start):
        run.add(key, sample)
        on_progress("one pass", 1)
    return [_from_sample(run.samples[f"{TEXT}/{example.index}"]) for example in examples]


def _to_sample(trajectory: Trajectory) -> dict[str, Any]:
    bits = {str(exit_): "".join("01"[agrees] for agrees in found) for exit_, found in trajectory.agreement.items()}
    return {**vars(trajectory), "token_ids": list(trajectory.token_ids), "agreement": bits}


def _from_sample(sample: dict[str, Any]) -> Trajectory:
    return Trajectory(
        prompt_tokens=sample["prompt_tokens"],
        token_ids=tuple(sample["token_ids"]),
        max_new_tokens=sample["max_new_tokens"],
        prompt_seconds=sample["prompt_seconds"],
        seconds=sample["seconds"],
        agreement={int(exit_): tuple(bit == "1" for bit in bits) for exit_, bits in sample["agreement"].items()},
    )


def _measure(
    work: SweepWork,
    examples: Sequence[Example],
    settings: list[Setting],
    predicted: list[SweepRow],
    run: RunFolder,
    mapper: Mapper,
    on_progress: Progress,
) -> list[SweepRow]:
    """Run settings on all prompts; returns the rows with what was measured."""
    left = {e.index: [s for s in (AUTOREGRESSIVE, *settings) if _run_key(e, s) not in run.samples] for e in examples}
    on_progress("measuring", sum(1 + len(settings) - len(open_) for open_ in left.values()))
    missing = [(RUN, example, left[example.index]) for example in examples if left[example.index]]
    waiting = {index: len(open_) for index, open_ in left.items()}
    for key, sample in mapper(missing, work.start):
        run.add(key, sample)
        on_progress("measuring", 1)
        waiting[sample["index"]] -= 1
        if waiting[sample["index"]] == 0:
            done = [example for example in examples if waiting[example.index] == 0]
            write_csv(run.path, _with_measured(predicted, settings, run, done))
    return _with_measured(predicted, settings, run, examples)


def _with_measured(
    predicted: Sequence[SweepRow], settings: Sequence[Setting], run: RunFolder, examples: Sequence[Example]
) -> list[SweepRow]:
    totals = {setting: _total(run, setting, examples) for setting in settings}
    return [_measured_row(row, totals.get((row.exit_layer, row.num_speculations))) for row in predicted]


def _run_key(example: Example, setting: Setting) -> str:
    return f"{RUN}/{example.index}/{setting[0]}/{setting[1]}"


def _decode(lm: LanguageModel, prompt: Sequence[int], setting: Setting, config: GenerationConfig) -> dict[str, Any]:
    """Run a setting on a prompt; returns it with its figures."""
    named = {"exit_layer": setting[0], "num_speculations": setting[1]}
    options: dict[str, Any] = {"generation_strategy": "self_speculative", **named}
    if setting == AUTOREGRESSIVE:
        options = {"generation_strategy": "autoregressive"}
    stats = lm.generate([list(prompt)], config, **options)[0].stats
    return {**named, **{name: getattr(stats, name) for name in ("tokens", "seconds", "drafted", "accepted")}}


def _total(run: RunFolder, setting: Setting, examples: Sequence[Example]) -> dict[str, float]:
    samples = [run.samples[_run_key(example, setting)] for example in examples]
    return {name: sum(sample[name] for sample in samples) for name in ("tokens", "seconds", "drafted", "accepted")}


def _measured_row(row: SweepRow, total: dict[str, float] | None) -> SweepRow:
    if total is None:
        return row
    return SweepRow(
        exit_layer=row.exit_layer,
        num_speculations=row.num_speculations,
        acceptance_rate=total["accepted"] / max(1.0, total["drafted"]),
        predicted_tokens_per_second=row.predicted_tokens_per_second,
        total_time=total["seconds"],
        time_per_token=total["seconds"] / total["tokens"],
        tokens_per_second=total["tokens"] / total["seconds"],
    )


def _report(
    trajectories: Sequence[Trajectory], rows: list[SweepRow], plain: float, seconds: dict[str, float]
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
        best=max(measured, key=lambda row: row.tokens_per_second or 0.0),
        autoregressive_tokens_per_second=plain,
        prediction_error=sum(errors) / len(errors),
        agreement={exit_: sum(sum(t.agreement[exit_]) for t in trajectories) / written for exit_ in exits},
        seconds=seconds,
    )
