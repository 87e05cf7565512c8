"""A sweep's prediction against the whole grid: acceptance, speed, and the time of each.

    python benchmarks/sweep_prediction.py --data-path human_eval.jsonl

The settings with the best prediction, and the best of the grid, are then run again in turns, because the fastest of
many noisy measurements is partly chance.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.progress import Progress, track

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.data.datasets import Example, encode_examples, load_examples
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.prediction import SweepRow
from layerskip.evaluation.sweep.run import TOP, SweepReport, make_grid, sweep
from layerskip.evaluation.sweep.trajectories import replay
from layerskip.evaluation.sweep.worker import SweepWork, from_sample, text_key

FINALISTS = 5
"""Settings of the grid that are run again."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    data_path: Path
    """File of HumanEval's prompts."""
    model: str = "demo"
    """demo, smollm2, gemma3-270m, a folder, a GGUF file or a hub id: a model that reads texts."""
    last_exit: int = 12
    last_length: int = 12
    num_samples: int = 12
    max_new_tokens: int = 96
    repetitions: int = 5
    """Runs of each finalist."""
    threads: int = 2


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    examples = load_examples("human_eval", data_path=arguments.data_path, num_samples=arguments.num_samples)
    lm = layerskip.load(arguments.model, dtype="float32")
    exits = range(1, arguments.last_exit + 1)
    grid = make_grid(exits, range(1, arguments.last_length + 1), lm.config.num_layers)
    work = SweepWork(
        load=partial(layerskip.load, arguments.model, dtype="float32"),
        exits=exits,
        config=GenerationConfig(max_new_tokens=arguments.max_new_tokens, do_sample=False),
    )
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as bar:
        run = RunFolder(Path(folder), "sweep", {})
        task = bar.add_task("sweep", total=None)
        report = sweep(
            work,
            examples,
            grid,
            run,
            exhaustive=True,
            on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
        acceptance = predicted_acceptance(run, examples, grid)
    differences = [abs(row.acceptance_rate - acceptance[row.setting]) for row in report.rows]
    predicted = ranked(report, "predicted_tokens_per_second")[:TOP]
    measured = ranked(report, "tokens_per_second")[:FINALISTS]
    finalists = list(dict.fromkeys(row.setting for row in [*predicted, *measured]))
    again = run_again(lm, examples, finalists, work.config, arguments.repetitions)
    summary = {
        "largest_difference_of_acceptance": max(differences),
        "pass_seconds": report.seconds["pass"],
        "grid_seconds": report.seconds["measurements"],
        "prediction_error": report.prediction_error,
        "predicted_best": predicted[0].setting,
        "grid_best": measured[0].setting,
        "predicted_best_of_grid_best": again[predicted[0].setting] / again[measured[0].setting],
        "predicted_best_of_best_finalist": again[predicted[0].setting] / max(again.values()),
        "best_predicted_of_best_finalist": max(again[row.setting] for row in predicted) / max(again.values()),
        "first_time_predicted_best_of_grid_best": (predicted[0].tokens_per_second or 0.0)
        / (measured[0].tokens_per_second or 1.0),
        "finalists": {f"exit {e}, {k} drafts": speed for (e, k), speed in again.items()},
    }
    console = Console(width=110)
    console.print_json(json.dumps(summary))
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "summary": summary,
        "grid": [asdict(row) for row in report.rows],
    }
    record = write_record(f"sweep-{Path(arguments.model).name}", content)
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {record}")


def ranked(report: SweepReport, by: str) -> list[SweepRow]:
    """Rows, the fastest first."""
    return sorted(report.rows, key=lambda row: getattr(row, by), reverse=True)


def predicted_acceptance(run: RunFolder, examples: Sequence[Example], grid: Sequence[Setting]) -> dict[Setting, float]:
    """Acceptance from replaying the texts."""
    trajectories = [from_sample(run.samples[text_key(example)]) for example in examples]
    found = {}
    for setting in grid:
        replays = [replay(trajectory, setting) for trajectory in trajectories]
        found[setting] = sum(r.accepted for r in replays) / max(1, sum(r.drafted for r in replays))
    return found


def run_again(
    lm: layerskip.LanguageModel,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    config: GenerationConfig,
    repetitions: int,
) -> dict[Setting, float]:
    """Tokens/s of settings that are run in turns."""
    prompts = encode_examples(lm, examples, config)
    tokens, seconds = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0.0)
    for _ in track(range(repetitions), "once more"):
        for prompt in prompts:
            for setting in settings:
                options: dict[str, Any] = setting._asdict()
                started = time.perf_counter()
                result = lm.generate([prompt], config, generation_strategy="self_speculative", **options)[0]
                seconds[setting] += time.perf_counter() - started
                tokens[setting] += result.stats.tokens
    return {setting: tokens[setting] / seconds[setting] for setting in settings}


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
