"""`layerskip batch`: decode every prompt of a file of JSON lines; what was interrupted goes on."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from dataclasses import field as default
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import DecodingArguments, ModelArguments, OutputArguments, parse
from layerskip.cli.flags.ray import RayArguments, check_ray
from layerskip.cli.ranks.session import common, own_copy
from layerskip.cli.terminal.progress import make_progress
from layerskip.cli.terminal.terminal import load_model, make_console
from layerskip.cli.workers import keep_output_clean, make_mapper, model_loader
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.batch.run import BatchSummary
    from layerskip.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Write after every prompt of a file of JSON lines, one JSON object a line in the same order.

    An interrupted batch goes on with the same command; finished lines aren't run again. With sampling, each line has a
    seed of its own, made of --seed and its place. A line that can't be decoded gets an error, and the exit code is 1.

    Example: layerskip batch --input prompts.jsonl --output-file texts.jsonl --batch-size 8 --max-new-tokens 64
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    input: Annotated[Path, arg(metavar="FILE")]
    """A .jsonl file: objects with a prompt, and an id if you like."""
    output_file: Annotated[Path, arg(metavar="FILE")]
    """The .jsonl file to write; until it is complete, FILE.partial.jsonl has the finished lines."""
    field: Annotated[str, arg(metavar="NAME")] = "prompt"
    """Field that holds the prompt: a text, or a list of chat messages (often 'messages')."""
    batch_size: int = 8
    """Most prompts to decode together; the texts don't depend on it."""
    decoding: DecodingArguments = default(default_factory=DecodingArguments)
    where: RayArguments = default(default_factory=RayArguments)
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if any line has an error."""
    arguments = parse(BatchArguments, "batch", argv)
    check_arguments(arguments)

    from layerskip.batch.lines import read_lines
    from layerskip.batch.results import PartialResults

    config = GenerationConfig(**asdict(arguments.decoding))
    lines, digest = read_lines(arguments.input, arguments.field)
    configuration = {**asdict(arguments.model), **asdict(config), "field": arguments.field, "input": digest}
    with closing(PartialResults(own_copy(arguments.output_file), config, configuration)) as results:
        from layerskip.batch.run import run_batch  # needs torch, and reading lines doesn't
        from layerskip.batch.worker import BatchWork

        work = BatchWork(
            load=model_source(arguments),
            config=config,
            seed=common(results.seed),
            batch_size=arguments.batch_size,
        )
        left = len(lines) - len(results.offsets)
        # On a cluster, the results of a group come back together: small groups keep all workers busy to the end.
        group_size = arguments.batch_size if arguments.where.ray else None
        with (
            make_progress(arguments.output) as bar,
            keep_output_clean(arguments.where),
            make_mapper(arguments.where, arguments.model, ceil(left / arguments.batch_size)) as mapper,
        ):
            task = bar.add_task("decoding", total=len(lines))
            summary = run_batch(
                work,
                lines,
                results,
                mapper=mapper,
                group_size=group_size,
                on_progress=lambda done: bar.update(task, advance=done),
            )
    if arguments.output.json:
        print(to_json(as_record(arguments, summary)))
    else:
        print_summary(arguments, summary)
    return ExitCode.CHECK_FAILED if summary.errors else ExitCode.DONE


def check_arguments(arguments: BatchArguments) -> None:
    """Check what can be checked before anything is read.

    Raises:
        InvalidArgumentError: Flags that don't go together, or a number below 1.
    """
    if arguments.batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be at least 1, got {arguments.batch_size}")
    check_ray(arguments.where, arguments.model)


def model_source(arguments: BatchArguments) -> "Callable[[], LanguageModel]":
    """What gives a worker its model: on a cluster each loads its own, and this process loads it before all else."""
    if arguments.where.ray:
        return model_loader(arguments.model)
    lm = load_model(arguments.model, arguments.output)
    return lambda: lm


def as_record(arguments: BatchArguments, summary: "BatchSummary") -> dict[str, Any]:
    """The summary, for programs."""
    return {**asdict(summary), "output_file": str(arguments.output_file)}


def print_summary(arguments: BatchArguments, summary: "BatchSummary") -> None:
    """The summary, for people."""
    console = make_console(arguments.output)
    earlier = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    console.print(
        f"{summary.lines} lines written to {arguments.output_file}{earlier}: {summary.tokens} tokens, "
        f"{summary.tokens_per_second:.1f} tokens/s",
        soft_wrap=True,
    )
    if summary.errors:
        console.print(f"errors: {summary.errors}; see 'error' in those lines", style="red")
