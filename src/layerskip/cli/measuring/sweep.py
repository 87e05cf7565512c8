"""`layerskip sweep`: find the fastest exit layer and draft length for a model, its prompts and this machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments, Switch, parse
from layerskip.cli.flags.dataset import DatasetArguments, load_examples, open_run
from layerskip.cli.flags.ray import RayArguments, check_ray
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import make_console, open_model, tell_left_out
from layerskip.cli.workers import keep_output_clean, make_mapper, model_loader
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.evaluation.setting import Setting
    from layerskip.evaluation.sweep.run import SweepReport

SHOWN = 10
"""Settings in the table."""


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Find the exit layer and the draft length that are fastest on a data set.

    One pass over the prompts tells the acceptance of every setting, measured costs its speed; the best three are then
    run for real. An interrupted sweep goes on with the same command.

    Example: layerskip sweep --dataset human_eval --data-path human_eval.jsonl --num-samples 20 --output-dir sweep
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    data: DatasetArguments = default(default_factory=DatasetArguments)
    max_new_tokens: int = 128
    """Most tokens to write for each prompt."""
    exit_layer_first: Annotated[int, arg(metavar="E")] = 1
    """Shallowest exit of the grid."""
    exit_layer_last: Annotated[int | None, arg(metavar="E")] = None
    """Deepest exit of the grid; three quarters of the layers if not given."""
    exit_layer_step: Annotated[int, arg(metavar="N")] = 1
    """Layers from one exit to the next."""
    num_speculations_first: Annotated[int, arg(metavar="K")] = 1
    """Shortest draft of the grid."""
    num_speculations_last: Annotated[int, arg(metavar="K")] = 12
    """Longest draft of the grid."""
    num_speculations_step: Annotated[int, arg(metavar="N")] = 1
    """Tokens from one draft length to the next."""
    ignore_eos: Switch = False
    """Write on after an end-of-sequence token, so that all texts are as long."""
    exhaustive: Switch = False
    """Run the whole grid for real, not only the three best, and the best of it once more."""
    save: Switch = False
    """Write the best setting beside the checkpoint (layerskip.json), where later calls find it."""
    output_dir: Annotated[Path, arg(metavar="DIR")] = Path("sweep")
    """Folder for results.json, sweep.csv, samples.jsonl and report.html."""
    where: RayArguments = default(default_factory=RayArguments)
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(SweepArguments, "sweep", argv)
    if arguments.save and arguments.model.model == "demo":
        raise InvalidArgumentError(
            "--save writes into the checkpoint's folder, and the embedded model's is part of the package; copy it first"
        )
    check_ray(arguments.where, arguments.model)
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens, ignore_eos=arguments.ignore_eos, do_sample=False)

    from layerskip.evaluation.report import write_report
    from layerskip.evaluation.sweep.run import sweep
    from layerskip.evaluation.sweep.worker import SweepWork

    checkpoint = open_model(arguments.model, arguments.output)
    grid = grid_of(arguments, checkpoint.config.num_layers)
    examples = load_examples(arguments.data)
    flags = ("exhaustive", "max_new_tokens", "ignore_eos")
    settings = {"grid": grid, **{name: getattr(arguments, name) for name in flags}}
    exits = sorted({exit_layer for exit_layer, _ in grid})
    with (
        open_run(arguments.output_dir, "sweep", arguments.model, arguments.data, settings) as folder,
        show_progress(arguments.output, "sweep") as on_progress,
        keep_output_clean(arguments.where),
        make_mapper(arguments.where, arguments.model, len(examples)) as mapper,
    ):
        report = sweep(
            SweepWork(load=model_loader(arguments.model), exits=exits, config=config),
            examples,
            grid,
            folder,
            exhaustive=arguments.exhaustive,
            mapper=mapper,
            on_progress=on_progress,
        )
        content = folder.finish(as_record(arguments, report))
        write_report(folder.path)
    tell_left_out(arguments.output, report.left_out, len(examples))
    saved = save_best(arguments, checkpoint.files.tuned_file, report, content["machine"]) if arguments.save else None
    if arguments.output.json:
        print(to_json({**content, "saved": None if saved is None else str(saved)}))
    else:
        print_report(arguments, report, saved)
    return ExitCode.DONE


def grid_of(arguments: SweepArguments, num_layers: int) -> "list[Setting]":
    """The settings that the ranges name."""
    from layerskip.evaluation.sweep.run import make_grid

    for name in ("exit_layer_step", "num_speculations_step"):
        if getattr(arguments, name) < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    last = arguments.exit_layer_last
    last = max(arguments.exit_layer_first, num_layers * 3 // 4) if last is None else last
    exits = range(arguments.exit_layer_first, last + 1, arguments.exit_layer_step)
    lengths = range(
        arguments.num_speculations_first, arguments.num_speculations_last + 1, arguments.num_speculations_step
    )
    return make_grid(exits, lengths, num_layers)


def as_record(arguments: SweepArguments, report: "SweepReport") -> dict[str, Any]:
    """The results, as results.json has them."""
    best = report.best
    return {
        "method": "exhaustive" if arguments.exhaustive else "one_pass",
        "autoregressive_tokens_per_second": report.autoregressive_tokens_per_second,
        "grid": [asdict(row) for row in report.rows],
        "best": {**asdict(best), "speedup": speedup(report)},
        "prediction_error": report.prediction_error,
        "agreement": {str(exit_layer): share for exit_layer, share in report.agreement.items()},
        "seconds": report.seconds,
        "left_out": report.left_out,
    }


def speedup(report: "SweepReport") -> float:
    """Of the best setting, over autoregressive decoding."""
    return (report.best.tokens_per_second or 0.0) / report.autoregressive_tokens_per_second


def save_best(arguments: SweepArguments, file: Path, report: "SweepReport", machine: dict[str, Any]) -> Path:
    """Write the best setting beside the checkpoint."""
    from layerskip.checkpoint.tuned import TunedSettings, write_tuned

    tuned: TunedSettings = TunedSettings(
        exit_layer=report.best.exit_layer,
        num_speculations=report.best.num_speculations,
        tokens_per_second=report.best.tokens_per_second or 0.0,
        speedup=speedup(report),
        agreement=report.agreement,
        source={
            "dataset": arguments.data.dataset,
            **{name: machine[name] for name in ("cpu", "gpu", "threads", "date")},
        },
    )
    write_tuned(file, tuned)
    return file


def print_report(arguments: SweepArguments, report: "SweepReport", saved: Path | None) -> None:
    """The best settings, for people."""
    from rich.table import Table

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    console = make_console(arguments.output)
    ranked = sorted(
        report.rows, key=lambda row: row.tokens_per_second or row.predicted_tokens_per_second or 0.0, reverse=True
    )
    measured = [row for row in ranked if row.tokens_per_second is not None]
    others = [row for row in ranked if row.tokens_per_second is None]
    table = Table(title=f"the best of {len(report.rows)} settings")
    for column in ("exit layer", "drafts", "acceptance", "predicted tokens/s", "measured tokens/s"):
        table.add_column(column, justify="right")
    for row in [*measured, *others][:SHOWN]:
        table.add_row(
            str(row.exit_layer),
            str(row.num_speculations),
            f"{row.acceptance_rate:.1%}",
            shown(row.predicted_tokens_per_second),
            shown(row.tokens_per_second),
        )
    console.print(table)
    best = report.best
    console.print(
        f"Best: exit layer {best.exit_layer} with {best.num_speculations} drafts, {shown(best.tokens_per_second)} "
        f"tokens/s, {speedup(report):.2f}x autoregressive decoding ({report.autoregressive_tokens_per_second:.1f}). "
        f"Predictions were off by {report.prediction_error:.1%} on average."
    )
    if saved is not None:
        console.print(f"Written to {saved}: later calls start from it.")
    console.print(f"Report: {arguments.output_dir / 'report.html'}", style="dim")
