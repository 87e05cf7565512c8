"""`layerskip verify`: prove on given prompts, or on a whole data set, that speculation changes nothing."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from dataclasses import field as default
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress, arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import File, ModelArguments, OutputArguments, Switch, parse, parse_numbers
from layerskip.cli.flags.arguments import Text as TextFlag
from layerskip.cli.flags.dataset import DatasetArguments, load_examples, open_run
from layerskip.cli.terminal.progress import make_progress, show_progress
from layerskip.cli.terminal.terminal import load_model, make_console, tell_left_out
from layerskip.decoding.config import Acceptance, GenerationConfig, Strategy
from layerskip.errors import InvalidArgumentError, PromptTooLongError
from layerskip.files import to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from layerskip.evaluation.data.datasets import Example
    from layerskip.evaluation.samples import SampleStore
    from layerskip.evaluation.verify.compare import VerifyReport
    from layerskip.evaluation.verify.distribution import DistributionReport
    from layerskip.language_model import LanguageModel

DEFAULT_PROMPTS = ("def add(a, b):", "import os\n\n\nclass Reader:\n", 'def count_words(text):\n    """')
PROMPT_TOKENS = 32
"""Tokens of the first prompt after which the distribution test draws."""
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
"""Fields of `GenerationConfig` that have flags here."""
NEAR_TIES_SHOWN = 40
"""Rows of the list of near-ties."""


@dataclass(frozen=True, kw_only=True)
class PromptDataArguments(DatasetArguments):
    """A data set to verify on, in place of prompts."""

    dataset: Annotated[str | None, arg(metavar="NAME")] = None  # type: ignore[assignment]
    """cnn_dm_summarization, cnn_dm_lm, xsum_summarization, human_eval, top_v2, gsm8k, spec_bench, custom_jsonl or
    chat_format."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(GenerationConfig):
    """Length and sampling; all else is what is verified."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = 0
    """Seed of sampling."""
    generation_strategy: Suppress[Strategy | None] = None
    exit_layer: Suppress[int | None] = None
    num_speculations: Suppress[int | None] = None
    do_sample: Suppress[bool | None] = None
    repetition_penalty: Suppress[float] = 1.0
    no_repeat_ngram_size: Suppress[int] = 0
    frequency_penalty: Suppress[float] = 0.0
    presence_penalty: Suppress[float] = 0.0
    logit_bias: Suppress[tuple[tuple[int, float], ...]] = ()
    logprobs: Suppress[int | None] = None
    acceptance: Suppress[Acceptance] = "coupled"
    block_verification: Suppress[bool] = True
    stop: Suppress[tuple[str, ...]] = ()
    eos_token_ids: Suppress[tuple[int, ...] | None] = None
    ignore_eos: Suppress[bool] = False


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Decode prompts autoregressively and self-speculatively, and compare token by token.

    Every difference is teacher-forced: it is a near-tie if rounding explains it, and an error if not. The exit code is
    1 if there is any error. With --output-dir, every comparison is kept, and an interrupted run goes on with the same
    command.

    Example: layerskip verify --prompts prompts.jsonl --field prompt --exit-layers 2,4 --num-speculations 1,4
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    prompt: TextFlag = None
    """A single prompt."""
    prompts: File = None
    """A text file (one prompt), or a .jsonl file (a prompt in each line)."""
    field: Annotated[str | None, arg(metavar="NAME")] = None
    """Field of the .jsonl file that holds the prompt; 'prompt' if not given."""
    limit: int | None = None
    """Most prompts to use."""
    data: PromptDataArguments = default(default_factory=PromptDataArguments)
    exit_layers: Annotated[str | None, arg(metavar="E,E,...")] = None
    """Exit layers to verify, or 'all'; a quarter and a half of the depth if not given."""
    num_speculations: Annotated[str, arg(metavar="K,K,...")] = "4"
    """Draft lengths to verify with each exit layer."""
    mode: Literal["both", "greedy", "coupled"] = "both"
    """Greedy decoding, coupled sampling, or both."""
    batch_size: int = 1
    """Prompts to decode together."""
    sampling: SamplingArguments = default(default_factory=SamplingArguments)
    tolerance: float | None = None
    """Logits may differ by this much in a near-tie; by dtype if not given (float32: 0.001)."""
    distribution: Switch = False
    """Also test statistically that rejection sampling, plain and block, draws from the model's distribution."""
    draws: int = 50_000
    """Draws of each distribution test."""
    output_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for results.json, samples.jsonl (every difference, with its text) and report.html."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if anything is lost."""
    arguments = parse(VerifyArguments, "verify", argv)
    check_sources(arguments)
    config = GenerationConfig(**asdict(arguments.sampling))
    lengths = parse_numbers("num_speculations", arguments.num_speculations)
    asked = read_asked(arguments)
    with open_store(arguments) as store:
        lm = load_model(arguments.model, arguments.output)
        exits = exit_layers(arguments, lm.decoder.num_layers)
        num_asked = len(asked)
        asked, prompts, left_out = encode(lm, asked, config)
        tell_left_out(arguments.output, left_out, num_asked)
        settings = [(exit_layer, length) for exit_layer in exits for length in lengths]
        indices = [example.index for example in asked]
        report = compare(arguments, lm, prompts, indices, settings, config, store)
        tests = verify_distributions(arguments, lm, prompts[0], config, exits, store) if arguments.distribution else []
        content = finish(store, report, tests, left_out)
    report = renumbered(report, indices)
    content = content or {**as_record(report, tests), "left_out": left_out}
    if arguments.output.json:
        print(to_json(content))
    else:
        print_report(arguments, report, tests)
    lost = report.errors > 0 or not all(test.passed for test in tests)
    return ExitCode.CHECK_FAILED if lost else ExitCode.DONE


def check_sources(arguments: VerifyArguments) -> None:
    """Check that the flags name prompts in one way.

    Raises:
        InvalidArgumentError: A prompt, a file and a data set exclude one another, and so do the flags of each.
    """
    data = arguments.data
    sources = {"a prompt": arguments.prompt, "a file of prompts": arguments.prompts, "a data set": data.dataset}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) > 1:
        raise InvalidArgumentError(f"give either {named[0]} or {named[1]}, not both")
    if data.dataset is None:
        defaults = PromptDataArguments()
        for name, value in asdict(data).items():
            if value != getattr(defaults, name):
                flag = name.replace("_", "-")
                raise InvalidArgumentError(f"--{flag} is for --dataset; name a data set, or leave it out")
        return
    for name, instead in (("field", "--template"), ("limit", "--num-samples")):
        if getattr(arguments, name) is not None:
            raise InvalidArgumentError(f"--{name} is for --prompts; with --dataset, use {instead}")


def read_asked(arguments: VerifyArguments) -> "list[Example]":
    """What the model is asked: prompts from the command line, a file or a data set, or a few of our own.

    Raises:
        InvalidArgumentError: They can't be read.
    """
    from layerskip.evaluation.data.datasets import Example

    if arguments.data.dataset is not None:
        return load_examples(arguments.data)
    return [Example(index=i, prompt=text, reference=None) for i, text in enumerate(read_texts(arguments))]


def encode(
    lm: "LanguageModel", asked: "Sequence[Example]", config: GenerationConfig
) -> "tuple[list[Example], list[list[int]], list[dict[str, Any]]]":
    """Prompts that leave room for an answer, their token ids, and the numbers of the others with the reasons.

    Raises:
        PromptError: None leaves room.
    """
    from layerskip.evaluation.data.datasets import encode_examples
    from layerskip.evaluation.left_out import find_left_out, left_out_sample

    encoded: dict[int, list[int]] = {}
    others: dict[str, dict[str, Any]] = {}
    for example in asked:
        try:
            (encoded[example.index],) = encode_examples(lm, [example], config)
        except PromptTooLongError as error:
            others |= [left_out_sample(example, error)]
    kept, left_out = find_left_out(asked, others)
    return kept, [encoded[example.index] for example in kept], left_out


def open_store(arguments: VerifyArguments) -> "AbstractContextManager[SampleStore]":
    """What keeps comparisons: memory, or a folder, whose configuration is all flags that comparisons depend on.

    Raises:
        InvalidArgumentError: The folder has another configuration's comparisons.
    """
    if arguments.output_dir is None:
        from layerskip.evaluation.samples import SampleStore

        return nullcontext(SampleStore())
    apart = ("model", "data", "output", "output_dir", "sampling")  # the first two are added by `open_run`
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    settings |= {name: getattr(arguments.sampling, name) for name in SAMPLING}
    if not arguments.distribution:
        settings["draws"] = None
    return open_run(arguments.output_dir, "verify", arguments.model, arguments.data, settings)


def compare(
    arguments: VerifyArguments,
    lm: "LanguageModel",
    prompts: list[list[int]],
    indices: list[int],
    settings: list[tuple[int, int]],
    config: GenerationConfig,
    store: "SampleStore",
) -> "VerifyReport":
    """Decode and compare."""
    from layerskip.evaluation.verify.compare import make_plan
    from layerskip.evaluation.verify.run import verify

    plan = make_plan(
        lm,
        settings,
        modes=("greedy", "coupled") if arguments.mode == "both" else (arguments.mode,),
        config=config,
        batch_size=arguments.batch_size,
        tolerance=arguments.tolerance,
    )
    with show_progress(arguments.output, "verifying") as on_progress:
        return verify(lm, prompts, plan, store, indices=indices, on_progress=on_progress)


def renumbered(report: "VerifyReport", indices: list[int]) -> "VerifyReport":
    """The report with prompts numbered as their file or data set has them."""
    settings = [
        replace(setting, divergences=[replace(d, prompt=indices[d.prompt]) for d in setting.divergences])
        for setting in report.settings
    ]
    return replace(report, settings=settings)


def finish(
    store: "SampleStore",
    report: "VerifyReport",
    tests: "list[DistributionReport]",
    left_out: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """Write a folder's results and report; returns what is in results.json, None where nothing is written."""
    from layerskip.evaluation.run_folder import RunFolder

    if not isinstance(store, RunFolder):
        return None

    from layerskip.evaluation.report import write_report
    from layerskip.evaluation.verify.run import to_results

    content = store.finish({**to_results(report, store, tests), "left_out": left_out})
    write_report(store.path)
    return content


def exit_layers(arguments: VerifyArguments, num_layers: int) -> list[int]:
    """Exit layers to verify."""
    if arguments.exit_layers is None:
        return list(dict.fromkeys(max(1, num_layers // part) for part in (4, 2)))
    if arguments.exit_layers == "all":
        return list(range(1, num_layers + 1))
    return parse_numbers("exit_layers", arguments.exit_layers)


def read_texts(arguments: VerifyArguments) -> list[str]:
    """Prompts from the command line, a file, or a few of our own."""
    from layerskip.evaluation.data.prompts import read_prompts

    if arguments.prompts is not None:
        return read_prompts(Path(arguments.prompts), field=arguments.field, limit=arguments.limit)
    return list(DEFAULT_PROMPTS) if arguments.prompt is None else [arguments.prompt]


def verify_distributions(
    arguments: VerifyArguments,
    lm: "LanguageModel",
    prompt: list[int],
    config: GenerationConfig,
    exits: list[int],
    store: "SampleStore",
) -> "list[DistributionReport]":
    """Distribution tests of both kinds of rejection sampling for each exit layer."""
    from layerskip.evaluation.verify.distribution import verify_distribution
    from layerskip.evaluation.verify.run import run_distribution_test

    reports = []
    with make_progress(arguments.output) as bar:
        task = bar.add_task("drawing", total=2 * len(exits))
        for exit_layer in exits:
            test = partial(verify_distribution, lm, prompt[:PROMPT_TOKENS], config, exit_layer, draws=arguments.draws)
            for block in (False, True):
                kind = "block" if block else "plain"
                bar.update(task, description=f"drawing {arguments.draws} pairs, exit {exit_layer}, {kind}")
                key = f"distribution/{exit_layer}/{kind}"
                reports.append(run_distribution_test(store, key, partial(test, block=block)))
                bar.advance(task)
    return reports


def as_record(report: "VerifyReport", tests: "list[DistributionReport]") -> dict[str, Any]:
    """The object that `--json` prints where there is no folder."""
    settings = [asdict(setting) for setting in report.settings]
    for setting in settings:
        for divergence in setting["divergences"]:
            del divergence["top2_gap"]  # for reports in folders; this format has no such field
    return {
        "settings": settings,
        "errors": report.errors,
        "num_prompts": report.num_prompts,
        "tolerance": report.tolerance,
        "distribution": [asdict(test) for test in tests],
    }


def print_report(arguments: VerifyArguments, report: "VerifyReport", tests: "list[DistributionReport]") -> None:
    """Tables of settings, near-ties and distribution tests, and a verdict."""
    console = make_console(arguments.output)
    console.print(_settings_table(report))
    if any(setting.near_ties for setting in report.settings):
        _print_near_ties(console, report, "results.json" if arguments.output_dir else "--json")
    if tests:
        console.print(_tests_table(tests, arguments.draws))
    failed = sum(not test.passed for test in tests)
    if report.errors or failed:
        console.print(f"{report.errors} errors, {failed} failed distribution tests", style="red")
    else:
        console.print("nothing lost", style="green")
    if arguments.output_dir is not None:
        console.print(f"Report: {arguments.output_dir / 'report.html'}", style="dim", soft_wrap=True)


def _settings_table(report: "VerifyReport") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.num_prompts} prompts, near-tie: within {report.tolerance:g} in logits")
    for column in ("mode", "exit", "drafts", "equal", "near-ties", "errors", "tokens", "acceptance"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for s in report.settings:
        acceptance = f"{s.accepted / s.drafted:.3f}" if s.drafted else "-"
        errors = Text(str(s.errors), style="red" if s.errors else "")
        cells = (s.exit_layer, s.num_speculations, s.equal, s.near_ties)
        table.add_row(s.mode, *map(str, cells), errors, str(s.tokens), acceptance)
    return table


def _print_near_ties(console: "Console", report: "VerifyReport", source: str) -> None:
    """Where rounding swapped tokens; `source` says who has the rest of a long list."""
    from rich.table import Table

    ties = [(s, d) for s in report.settings for d in s.divergences if d.near_tie]
    table = Table(title="near-ties: the first token that differs")
    for column in ("mode", "exit", "drafts", "prompt", "token no.", "expected", "written", "gap"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for s, d in ties[:NEAR_TIES_SHOWN]:
        cells = (s.exit_layer, s.num_speculations, d.prompt, d.position, d.expected, d.actual)
        table.add_row(s.mode, *map(str, cells), "filtered" if d.gap is None else f"{d.gap:.2g}")
    console.print(table)
    if len(ties) > NEAR_TIES_SHOWN:
        console.print(f"{len(ties) - NEAR_TIES_SHOWN} more near-ties: {source} has all", style="dim")


def _tests_table(tests: "list[DistributionReport]", draws: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"rejection sampling against the exact distribution, {draws} draws of two tokens")
    for column in ("acceptance rule", "exit", "acceptance", "cells", "chi-square", "p-value", "passed"):
        table.add_column(column, justify="left" if column == "acceptance rule" else "right")
    for t in tests:
        passed = Text("yes") if t.passed else Text("NO", style="red")
        figures = (f"{t.acceptance_rate:.3f}", str(t.cells), f"{t.chi_square:.1f}", f"{t.p_value:.3f}")
        table.add_row(t.acceptance, str(t.exit_layer), *figures, passed)
    return table
