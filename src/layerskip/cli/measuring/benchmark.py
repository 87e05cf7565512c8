"""`layerskip benchmark`: strategies side by side on a data set."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import DecodingArguments, ModelArguments, OutputArguments, Switch, parse
from layerskip.cli.flags.dataset import DatasetArguments, load_examples, open_run
from layerskip.cli.flags.ray import RayArguments, check_ray
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import make_console, tell_left_out
from layerskip.cli.workers import keep_output_clean, make_mapper, model_loader
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

METRICS = ("pass_at_1", "exact_match", "rouge1", "rouge2", "rouge3", "rougeL", "bleu")
DEFAULT_STRATEGIES = "autoregressive,self_speculative,adaptive"


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments:
    """Decode a data set by several strategies in turn: tokens/s with intervals, acceptance, and quality.

    Strategies: autoregressive, early_exit, self_speculative, adaptive, ngram, transformers and
    transformers_early_exit (its own decoding, to compare with). An interrupted benchmark goes on with the same command.

    Example: layerskip benchmark --dataset gsm8k --data-path gsm8k.jsonl --num-samples 50 --output-dir benchmark
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    data: DatasetArguments = default(default_factory=DatasetArguments)
    strategies: Annotated[str, arg(metavar="NAME,...")] = DEFAULT_STRATEGIES
    """Strategies to compare."""
    decoding: DecodingArguments = default(default_factory=DecodingArguments)
    execute_code: Switch = False
    """Run the programs that the model writes for human_eval, in processes with limits, and report pass@1. That is no
    protection from code that means harm."""
    output_dir: Annotated[Path, arg(metavar="DIR")] = Path("benchmark")
    """Folder for results.json, samples.jsonl and report.html."""
    where: RayArguments = default(default_factory=RayArguments)
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(BenchmarkArguments, "benchmark", argv)
    if arguments.decoding.generation_strategy is not None:
        raise InvalidArgumentError("--strategies says how to decode here; leave out --generation-strategy")
    if arguments.execute_code and arguments.data.dataset != "human_eval":
        raise InvalidArgumentError("--execute-code is for --dataset human_eval; others have no programs to run")
    check_ray(arguments.where, arguments.model)
    strategies = [name.strip() for name in arguments.strategies.split(",") if name.strip()]

    from layerskip.evaluation.benchmark.run import BenchmarkWork, benchmark
    from layerskip.evaluation.benchmark.runners import check_strategies
    from layerskip.evaluation.report import write_report

    check_strategies(strategies)
    examples, config = load_examples(arguments.data), arguments.decoding
    settings = {**asdict(config), "strategies": strategies, "execute_code": arguments.execute_code}
    work = BenchmarkWork(
        load=model_loader(arguments.model),
        strategies=strategies,
        config=config,
        dataset=arguments.data.dataset,
        execute_code=arguments.execute_code,
    )
    with (
        open_run(arguments.output_dir, "benchmark", arguments.model, arguments.data, settings) as folder,
        show_progress(arguments.output, "benchmark") as on_progress,
        keep_output_clean(arguments.where),
        make_mapper(arguments.where, arguments.model, len(examples)) as mapper,
    ):
        results = benchmark(work, examples, folder, mapper=mapper, on_progress=on_progress)
        content = folder.finish(results)
        write_report(folder.path)
    tell_left_out(arguments.output, results["left_out"], len(examples))
    if arguments.output.json:
        print(to_json(content))
    else:
        print_report(arguments, results)
    return ExitCode.DONE


def print_report(arguments: BenchmarkArguments, results: dict[str, Any]) -> None:
    """A table of strategies, for people."""
    from rich.table import Table

    from layerskip.evaluation.benchmark.summary import empty_note

    console, rows = make_console(arguments.output), results["strategies"]
    speed = Table(title=f"{arguments.data.dataset}, {rows[0]['samples']} prompts: speed")
    speed.add_column("strategy", no_wrap=True)
    for column in ("tokens/s", "speedup (95 %)", "ms to\nfirst", "ms a\ntoken", "accepted"):
        speed.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        speed.add_row(*_speed_cells(row))
    console.print(speed)
    metrics = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    if metrics:
        quality = Table("strategy", title="quality")
        for name in metrics:
            quality.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            shown = (row["metrics"].get(name) for name in metrics)
            quality.add_row(row["name"], *("" if value is None else f"{value:.3f}" for value in shown))
        console.print(quality)
    if (note := empty_note(rows)) is not None:
        console.print(note)
    console.print(f"Report: {arguments.output_dir / 'report.html'}", style="dim")


def _speed_cells(row: dict[str, Any]) -> list[str]:
    low, ratio, high = row["speedup_low"], row["speedup"], row["speedup_high"]
    interval = "" if low is None else f" ({low:.2f}-{high:.2f})"
    first, per_token = row["time_to_first_token_s"]["median"], row["time_per_token_s"]["median"]
    drafts = bool(row["drafted_by_position"])
    return [
        row["name"],
        f"{row['tokens_per_second']:.1f}",
        "" if ratio is None else f"{ratio:.2f}x{interval}",
        "" if first is None else f"{1e3 * first:.1f}",
        "" if per_token is None else f"{1e3 * per_token:.2f}",
        f"{row['acceptance_rate']:.1%}" if drafts else "",
    ]
