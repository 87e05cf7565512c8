"""`layerskip bench-serve`: load on any server of OpenAI's protocol."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import File, OutputArguments, Switch, parse
from layerskip.cli.flags.dataset import DatasetArguments, load_examples
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import make_console
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.load.config import LoadConfig, parse_words, path_of
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.evaluation.load.run import LoadWork, Prompt
    from layerskip.evaluation.run_folder import RunFolder

SYNTHETIC = "synthetic"
KEYS = ("LAYERSKIP_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, kw_only=True)
class PromptArguments(DatasetArguments):
    """Which prompts are sent; requests take them in turn."""

    dataset: Annotated[str, arg(metavar="NAME")] = SYNTHETIC
    """synthetic, or a data set: cnn_dm_summarization, cnn_dm_lm, xsum_summarization, human_eval, top_v2, gsm8k,
    spec_bench, custom_jsonl or chat_format."""
    prompt_words: Annotated[str | None, arg(metavar="N or LOW-HIGH")] = None
    """Words of a synthetic prompt, drawn at random; 64 if not given."""

    def __post_init__(self) -> None:
        """Check that flags of data sets have a data set, and those of synthetic prompts none."""
        if self.dataset != SYNTHETIC:
            if self.prompt_words is not None:
                raise InvalidArgumentError(f"--prompt-words is for synthetic prompts; --dataset is {self.dataset}")
            return
        parse_words(self.prompt_words or "64")
        for field in fields(DatasetArguments):
            if field.name != "dataset" and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise InvalidArgumentError(f"--{flag} belongs to a data set; name one: --dataset")


@dataclass(frozen=True, kw_only=True)
class LoadArguments(LoadConfig):
    """The load on a server."""

    model: Annotated[str | None, arg(metavar="NAME")] = None
    extra_body: Annotated[str | None, arg(metavar="JSON")] = None
    ignore_eos: Switch = False


@dataclass(frozen=True, kw_only=True)
class BenchServeArguments:
    """Send requests to a server of OpenAI's protocol (ours, vLLM's, llama.cpp's), and measure what clients see.

    The load: N clients that each wait for their answer (--concurrency), or requests that arrive at random
    (--request-rate). The figures: requests and tokens a second, time to the first token, between tokens and to the end
    as percentiles, errors by kind, and acceptance where the server tells it. The exit code is 1 if a request failed.

    Example: layerskip bench-serve http://127.0.0.1:8000 --concurrency 8 --seconds 60 --output-dir runs/load
    """

    url: Annotated[Positional[str], arg(metavar="URL")]
    """The server's address, with /v1 or without."""
    load: LoadArguments = default(default_factory=LoadArguments)
    data: PromptArguments = default(default_factory=PromptArguments)
    api_key_file: File = None
    """A file with the server's key; without it LAYERSKIP_API_KEY or OPENAI_API_KEY counts, if set."""
    output_dir: Annotated[Path | None, arg(metavar="DIR", aliases=["--output"])] = None
    """Folder for results.json, samples.jsonl and report.html. Requests are kept as they end, and an interrupted run
    goes on with the same command."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if a request failed."""
    arguments = parse(BenchServeArguments, "bench-serve", argv)
    key = read_key(arguments.api_key_file)

    from layerskip.evaluation.load.run import LoadWork, find_target

    config = LoadConfig(**asdict(arguments.load))
    prompt = make_prompts(arguments.data, config)
    target = find_target(arguments.url, key, config)
    return measure(arguments, LoadWork(target=target, config=config, prompt=prompt))


def measure(arguments: BenchServeArguments, work: "LoadWork") -> int:
    """Send the load, and show the figures; also those of a run that Ctrl-C has ended."""
    from layerskip.evaluation.load.figures import summarize
    from layerskip.evaluation.load.run import run_load
    from layerskip.evaluation.report import write_report
    from layerskip.evaluation.samples import SampleStore

    share, interrupted, record = None, False, None
    with ExitStack() as opened:
        folder = open_folder(arguments, work, opened)
        store: SampleStore = SampleStore() if folder is None else folder
        try:
            with show_progress(arguments.output, "warming up") as on_progress:
                share = run_load(work, store, on_progress=on_progress)
        except KeyboardInterrupt:
            interrupted = True
        results = {
            "url": arguments.url,
            "model": work.target.model,
            "endpoint": path_of(work.config, work.prompt(0)),
            **summarize(list(store.samples.values()), client_share=share),
        }
        if folder is not None and not interrupted:
            record = folder.finish(results)
            write_report(folder.path)
    if arguments.output.json:
        print(to_json(record or {"kind": "bench-serve", "interrupted": interrupted, "results": results}))
    else:
        print_report(arguments, results, interrupted=interrupted)
    if interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.CHECK_FAILED if results["errors"] else ExitCode.DONE


def open_folder(arguments: BenchServeArguments, work: "LoadWork", opened: ExitStack) -> "RunFolder | None":
    """The run's folder, if it has one; closed with `opened`."""
    from layerskip.evaluation.run_folder import open_run_folder

    if arguments.output_dir is None:
        return None
    settings = {"url": arguments.url, **asdict(arguments.data), **asdict(work.config), "model": work.target.model}
    return opened.enter_context(open_run_folder(arguments.output_dir, "bench-serve", settings))


def read_key(file: Path | None) -> str | None:
    """The server's key, from a file or the environment; None if there is none.

    Raises:
        InvalidArgumentError: The file can't be read, or holds no key.
    """
    if file is None:
        name = next((name for name in KEYS if os.environ.get(name)), None)
        key, place = (os.environ[name].strip(), name) if name else (None, "")
    else:
        from layerskip.cli.terminal.prompt_text import read_text_file

        key, place = read_text_file("--api-key-file", file).strip(), f"--api-key-file {file}"
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key and key):
        raise InvalidArgumentError(f"{place} must hold one key, in a line of ASCII characters without spaces")
    return key


def make_prompts(arguments: PromptArguments, config: LoadConfig) -> "Callable[[int], Prompt]":
    """The function that gives the prompt of a request; checks that the endpoint takes them.

    Raises:
        InvalidArgumentError: Anything wrong with the data set.
    """
    from layerskip.evaluation.load.arrivals import synthetic_prompt
    from layerskip.evaluation.load.run import prompts_in_turn

    if arguments.dataset == SYNTHETIC:
        low, high = parse_words(arguments.prompt_words or "64")
        return lambda index: synthetic_prompt(low, high, config.seed or 0, index)
    prompts: list[Prompt] = [example.prompt for example in load_examples(arguments)]
    for prompt in prompts:
        path_of(config, prompt)
    return prompts_in_turn(prompts)


def print_report(arguments: BenchServeArguments, results: dict[str, Any], *, interrupted: bool) -> None:
    """Figures for people."""
    from rich.table import Table

    from layerskip.evaluation.report import numbers as show
    from layerskip.evaluation.report.kinds.load import TIMES, notes

    console = make_console(arguments.output)
    console.print(
        f"{results['answered']} of {results['requests']} requests answered in {show.seconds(results['seconds'])}: "
        f"{show.significant(results['requests_per_second'])} requests/s, "
        f"{show.significant(results['output_tokens_per_second'])} output tokens/s"
    )
    latency = Table("latency in ms", title=f"{results['model']} at {results['url']}{results['endpoint']}")
    for column in ("mean", "p50", "p90", "p95", "p99"):
        latency.add_column(column, justify="right", no_wrap=True)
    for name, title in TIMES.items():
        if results[name]["count"]:
            values = (results[name][column] for column in ("mean", "p50", "p90", "p95", "p99"))
            latency.add_row(title, *(f"{1e3 * value:.2f}" for value in values))
    console.print(latency)
    for error in results["errors"]:
        console.print(f"{error['count']} x {error['kind']}: {error['example']}", style="red", soft_wrap=True)
    for note in notes(results):
        console.print(note, soft_wrap=True)
    if interrupted:
        more = f"; the same command goes on in {arguments.output_dir}" if arguments.output_dir else ""
        console.print(f"Interrupted{more}.", soft_wrap=True)
    elif arguments.output_dir is not None:
        console.print(f"Report: {arguments.output_dir / 'report.html'}", style="dim")
