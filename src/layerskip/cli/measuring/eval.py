"""`layerskip eval`: tasks of EleutherAI's lm-evaluation-harness at one exit after another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments, Switch, parse, parse_numbers
from layerskip.cli.flags.ray import RayArguments, check_ray
from layerskip.cli.ranks.session import own_copy
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import load_model, make_console, open_model
from layerskip.cli.workers import keep_output_clean, make_mapper, model_loader
from layerskip.decoding.config import GenerationConfig, Strategy
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.table import Table

    from layerskip.evaluation.eval.run import EvalReport
    from layerskip.evaluation.run_folder import RunFolder

NO_SPEEDUP = (
    "Speculation doesn't speed up log-likelihoods: a given text takes one pass through all layers with any strategy. "
    "Only texts that tasks have written (generate_until) gain."
)
ERROR = "_stderr"
"""What the harness adds to the name of a metric whose standard error it gives."""


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Run tasks of lm-evaluation-harness, as if the model ended at each of the exit layers.

    An early exit changes scores as well as texts. With all layers, texts are the same with any strategy. An interrupted
    evaluation goes on with the same command.

    Example: layerskip eval --tasks arc_easy,gsm8k --limit 100 --exit-layers 4,8,16 --output-dir eval
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    tasks: Annotated[str, arg(metavar="NAME,...")]
    """Names of tasks or groups, patterns, or YAML files."""
    include_path: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of tasks of your own, in YAML."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """Most documents of each task."""
    num_fewshot: Annotated[int | None, arg(metavar="N")] = None
    """Solved examples in each prompt; the task's own number if not given."""
    exit_layers: Annotated[str | None, arg(metavar="E,E,...")] = None
    """Exit layers to evaluate, or 'all'; all layers of the model if not given."""
    generation_strategy: Strategy | None = None
    """How texts are written with all layers, as in generate; earlier exits write one token a step. early_exit:
    evaluate the exit that exit_layer or exit_layers names."""
    exit_layer: Annotated[int | None, arg(metavar="E")] = None
    """Layers that draft; with early_exit, layers that are run at all."""
    num_speculations: Annotated[int | None, arg(metavar="K")] = None
    """Most tokens to draft in a round."""
    seed: int = 0
    """Seed of texts that a task wants sampled."""
    batch_size: Annotated[int, arg(metavar="B")] = 1
    """Texts to write together."""
    apply_chat_template: Switch = False
    """Put prompts into the tokenizer's chat template."""
    output_dir: Annotated[Path, arg(metavar="DIR")] = Path("eval")
    """Folder for results.json, samples.jsonl, report.html and the harness's own files, exit_E."""
    where: RayArguments = default(default_factory=RayArguments)
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(EvalArguments, "eval", argv)
    config = make_config(arguments)
    check_ray(arguments.where, arguments.model)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    exits = named_exits(arguments)

    from layerskip.evaluation.eval.answers import WITHOUT_TOKENS
    from layerskip.evaluation.eval.run import evaluate, find_tasks
    from layerskip.evaluation.report import write_report
    from layerskip.evaluation.run_folder import read_results

    tasks = find_tasks(names, arguments.include_path)
    model = open_model(arguments.model, arguments.output).config
    chosen = list(range(1, model.num_layers + 1)) if exits == "all" else exits or [model.num_layers]
    for exit_layer in chosen:
        model.check_exit_layer(exit_layer)
    options: dict[str, Any] = {
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "batch_size": arguments.batch_size,
        "apply_chat_template": arguments.apply_chat_template,
        "exit_layers": chosen,
        "config": config,
    }
    with open_folder(arguments, names, chosen) as folder:
        if arguments.where.ray:
            answer_on_cluster(arguments, names, options, folder)
        lm = load_model(arguments.model, arguments.output)
        with show_progress(arguments.output, "reading tasks") as on_progress:
            report = evaluate(lm, tasks, output=folder, on_progress=on_progress, **options)
        content, _ = read_results(folder.path)
        write_report(folder.path)
    notes = [NO_SPEEDUP] if report.scores and speculates(arguments) else []
    if empty := int(report.exits[0].speed.get(WITHOUT_TOKENS, 0)):
        notes.append(
            f"{empty} continuations have no token of their own, because one token spans their joint with the context; "
            "they count 0, as in the harness."
        )
    note = " ".join(notes) or None
    if arguments.output.json:
        print(to_json({**content, "note": note}))
    else:
        print_report(arguments, report, note)
    return ExitCode.DONE


def answer_on_cluster(
    arguments: EvalArguments, tasks: Sequence[str], options: Mapping[str, Any], folder: "RunFolder"
) -> None:
    """Have the requests answered by workers, before this process loads the model: a worker may need its GPU."""
    from layerskip.evaluation.eval.shards import EvalWork, answer_elsewhere, number_of_shards

    work = EvalWork(
        load=model_loader(arguments.model),
        tasks=tuple(str(Path(task).resolve()) if Path(task).is_file() else task for task in tasks),
        include_path=None if arguments.include_path is None else arguments.include_path.resolve(),
        options=options,
    )
    shards = number_of_shards(arguments.where.num_workers)
    with (
        show_progress(arguments.output, "starting workers") as on_progress,
        keep_output_clean(arguments.where),
        make_mapper(arguments.where, arguments.model, shards) as mapper,
    ):
        answer_elsewhere(work, folder, mapper, shards, on_progress=on_progress)


def make_config(arguments: EvalArguments) -> GenerationConfig:
    """How texts are written with all layers."""
    if arguments.generation_strategy == "early_exit":
        if arguments.num_speculations is not None:
            raise InvalidArgumentError("num_speculations is for strategies that draft; early_exit doesn't")
        return GenerationConfig(seed=arguments.seed)
    return GenerationConfig(
        generation_strategy=arguments.generation_strategy,
        exit_layer=arguments.exit_layer,
        num_speculations=arguments.num_speculations,
        seed=arguments.seed,
    )


def named_exits(arguments: EvalArguments) -> list[int] | Literal["all"] | None:
    """Exits to evaluate, as far as they are named."""
    if arguments.generation_strategy == "early_exit":
        if (arguments.exit_layer is None) == (arguments.exit_layers is None):
            raise InvalidArgumentError("early_exit needs either exit_layer or exit_layers: the exits to evaluate")
        if arguments.exit_layer is not None:
            return [arguments.exit_layer]
    if arguments.exit_layers == "all":
        return "all"
    return None if arguments.exit_layers is None else parse_numbers("exit_layers", arguments.exit_layers)


def speculates(arguments: EvalArguments) -> bool:
    """Whether a strategy that drafts was asked for."""
    if arguments.generation_strategy is None:
        return arguments.exit_layer is not None or arguments.num_speculations is not None
    return arguments.generation_strategy not in ("autoregressive", "early_exit")


def open_folder(arguments: EvalArguments, tasks: list[str], exits: list[int]) -> "AbstractContextManager[RunFolder]":
    """The folder of a run with these flags; nobody else can write to it meanwhile."""
    from layerskip.evaluation.run_folder import open_run_folder

    left_out = ("model", "where", "output", "output_dir", "tasks", "exit_layers")
    flags = {name: value for name, value in asdict(arguments).items() if name not in left_out}
    named = {"tasks": tasks, "exit_layers": exits}
    return open_run_folder(own_copy(arguments.output_dir), "eval", {**asdict(arguments.model), **named, **flags})


def print_report(arguments: EvalArguments, report: "EvalReport", note: str | None) -> None:
    """Tables of tasks and of speed by exit."""
    from layerskip.evaluation.report.kinds.eval import SHARED_PASS

    console = make_console(arguments.output)
    metrics = dict.fromkeys(
        (task, metric)
        for exit_ in report.exits
        for task, values in exit_.tasks.items()
        for metric in values
        if ERROR not in metric
    )
    quality = {
        f"{task} {metric.removesuffix(',none')}": [_cell(e.tasks.get(task, {}), metric) for e in report.exits]
        for task, metric in metrics
    }
    names = dict.fromkeys(name for exit_ in report.exits for name in exit_.speed)
    speed = {
        name.replace("_", " "): [f"{e.speed[name]:.4g}" if name in e.speed else "" for e in report.exits]
        for name in names
    }
    exits = [str(exit_.exit_layer) for exit_ in report.exits]
    console.print(_table("quality by exit layer", exits, quality))
    console.print(_table("speed by exit layer", exits, speed))
    if len(exits) > 1 and report.scores:
        console.print(SHARED_PASS)
    if note is not None:
        console.print(note)
    console.print(f"Report: {arguments.output_dir / 'report.html'}", style="dim")


def _table(title: str, exits: Sequence[str], rows: Mapping[str, Sequence[str]]) -> "Table":
    """Figures by exit: across or down, whichever is narrower."""
    from rich.table import Table

    from layerskip.evaluation.report.kinds.eval import stand_across

    across = stand_across(exits, rows)
    table = Table("" if across else "exit", title=title)
    for name in exits if across else rows:
        table.add_column(name, justify="right", no_wrap=across)
    for name, cells in rows.items() if across else zip(exits, zip(*rows.values(), strict=True), strict=True):
        table.add_row(name, *cells)
    return table


def _cell(metrics: dict[str, Any], metric: str) -> str:
    """A value with its standard error."""
    name, comma, rest = metric.partition(",")
    value, error = metrics.get(metric), metrics.get(f"{name}{ERROR}{comma}{rest}")
    if value is None:
        return "-"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
