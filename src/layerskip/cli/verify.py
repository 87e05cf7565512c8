"""`layerskip verify`: prove on given prompts that speculation changes nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from layerskip.cli.arguments import File, ModelArguments, OutputArguments, Switch, parse
from layerskip.cli.arguments import Text as TextFlag
from layerskip.cli.exit_code import ExitCode
from layerskip.cli.progress import make_progress
from layerskip.cli.terminal import load_model, make_console
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError

if TYPE_CHECKING:
    from layerskip.evaluation.distribution import DistributionReport
    from layerskip.evaluation.lossless import LosslessReport, Mode
    from layerskip.language_model import LanguageModel

DEFAULT_PROMPTS = ("def add(a, b):", "import os\n\n\nclass Reader:\n", 'def count_words(text):\n    """')
PROMPT_TOKENS = 32
"""Tokens of the first prompt after which the distribution test draws."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Decode prompts autoregressively and self-speculatively, and compare token by token.

    Every difference is teacher-forced: it is a near-tie if rounding explains it, and an error if not. The exit code is
    1 if there is any error.

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
    exit_layers: Annotated[str | None, arg(metavar="E,E,...")] = None
    """Exit layers to check, or 'all'; a quarter and a half of the depth if not given."""
    num_speculations: Annotated[str, arg(metavar="K,K,...")] = "4"
    """Draft lengths to check with each exit layer."""
    mode: Literal["both", "greedy", "coupled"] = "both"
    """Greedy decoding, coupled sampling, or both."""
    max_new_tokens: int = 64
    """Most tokens to write for each prompt."""
    batch_size: int = 1
    """Prompts to decode together."""
    temperature: float = 0.8
    """Of sampling."""
    top_k: int = 0
    """Sample among the k most likely tokens only; 0 is all."""
    top_p: float = 0.95
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability."""
    seed: int = 0
    """Seed of sampling."""
    tolerance: float | None = None
    """Logits may differ by this much in a near-tie; by dtype if not given (float32: 0.001)."""
    distribution: Switch = False
    """Also test statistically that rejection sampling, plain and block, draws from the model's distribution."""
    draws: int = 50_000
    """Draws of each distribution test."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if anything is lost."""
    arguments = parse(VerifyArguments, "verify", argv)
    config = make_config(arguments)
    lengths = parse_numbers("num_speculations", arguments.num_speculations)
    texts = read_texts(arguments)
    lm = load_model(arguments.model, arguments.output)
    exits = exit_layers(arguments, lm.decoder.num_layers)
    prompts = lm.encode(texts)

    from layerskip.evaluation.lossless import verify_lossless

    modes: tuple[Mode, ...] = ("greedy", "coupled") if arguments.mode == "both" else (arguments.mode,)
    settings = [(exit_layer, length) for exit_layer in exits for length in lengths]
    with make_progress(arguments.output) as bar:
        task = bar.add_task("verifying", total=len(prompts) * len(modes) * (len(settings) + 1))
        report = verify_lossless(
            lm,
            prompts,
            settings,
            modes=modes,
            config=config,
            batch_size=arguments.batch_size,
            tolerance=arguments.tolerance,
            on_progress=lambda what, done: bar.update(task, description=what, advance=done),
        )
    tests = check_distributions(arguments, lm, prompts[0], config, exits) if arguments.distribution else []
    if arguments.output.json:
        print(json.dumps(to_json(report, tests)))
    else:
        print_report(arguments, report, tests)
    lost = report.errors > 0 or not all(test.passed for test in tests)
    return ExitCode.CHECK_FAILED if lost else ExitCode.DONE


def make_config(arguments: VerifyArguments) -> GenerationConfig:
    """How the prompts are decoded."""
    return GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
    )


def parse_numbers(name: str, text: str) -> list[int]:
    """Positive whole numbers from a list such as '1,4'."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InvalidArgumentError(f"{name} must be positive whole numbers separated by commas, got {text!r}")
    return list(dict.fromkeys(numbers))


def exit_layers(arguments: VerifyArguments, num_layers: int) -> list[int]:
    """Exit layers to check."""
    if arguments.exit_layers is None:
        return list(dict.fromkeys(max(1, num_layers // part) for part in (4, 2)))
    if arguments.exit_layers == "all":
        return list(range(1, num_layers + 1))
    return parse_numbers("exit_layers", arguments.exit_layers)


def read_texts(arguments: VerifyArguments) -> list[str]:
    """Prompts from the command line, a file, or a few of our own."""
    from layerskip.evaluation.prompts import read_prompts

    if arguments.prompt is not None and arguments.prompts is not None:
        raise InvalidArgumentError("give either a prompt or a file of prompts, not both")
    if arguments.prompts is not None:
        return read_prompts(Path(arguments.prompts), field=arguments.field, limit=arguments.limit)
    return list(DEFAULT_PROMPTS) if arguments.prompt is None else [arguments.prompt]


def check_distributions(
    arguments: VerifyArguments, lm: "LanguageModel", prompt: list[int], config: GenerationConfig, exits: list[int]
) -> "list[DistributionReport]":
    """Distribution tests of both kinds of rejection sampling for each exit layer."""
    from layerskip.evaluation.distribution import check_distribution

    reports = []
    with make_progress(arguments.output) as bar:
        task = bar.add_task("drawing", total=2 * len(exits))
        for exit_layer in exits:
            for block in (False, True):
                kind = "block" if block else "plain"
                bar.update(task, description=f"drawing {arguments.draws} pairs, exit {exit_layer}, {kind}")
                reports.append(
                    check_distribution(
                        lm, prompt[:PROMPT_TOKENS], config, exit_layer, block=block, draws=arguments.draws
                    )
                )
                bar.advance(task)
    return reports


def to_json(report: "LosslessReport", tests: "list[DistributionReport]") -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "settings": [asdict(setting) for setting in report.settings],
        "errors": report.errors,
        "num_prompts": report.num_prompts,
        "tolerance": report.tolerance,
        "distribution": [asdict(test) for test in tests],
    }


def print_report(arguments: VerifyArguments, report: "LosslessReport", tests: "list[DistributionReport]") -> None:
    """Tables of settings and of distribution tests, and a verdict."""
    from rich.table import Table
    from rich.text import Text

    console = make_console(arguments.output)
    table = Table(title=f"{report.num_prompts} prompts, near-tie: within {report.tolerance:g} in logits")
    for column in ("mode", "exit", "drafts", "equal", "near-ties", "errors", "tokens", "acceptance"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for s in report.settings:
        acceptance = f"{s.accepted / s.drafted:.3f}" if s.drafted else "-"
        errors = Text(str(s.errors), style="red" if s.errors else "")
        cells = (s.exit_layer, s.num_speculations, s.equal, s.near_ties)
        table.add_row(s.mode, *map(str, cells), errors, str(s.tokens), acceptance)
    console.print(table)
    if tests:
        table = Table(title=f"rejection sampling against the exact distribution, {arguments.draws} draws of two tokens")
        for column in ("acceptance rule", "exit", "acceptance", "cells", "chi-square", "p-value", "passed"):
            table.add_column(column, justify="left" if column == "acceptance rule" else "right")
        for t in tests:
            passed = Text("yes") if t.passed else Text("NO", style="red")
            figures = (f"{t.acceptance_rate:.3f}", str(t.cells), f"{t.chi_square:.1f}", f"{t.p_value:.3f}")
            table.add_row(t.acceptance, str(t.exit_layer), *figures, passed)
        console.print(table)
    failed = sum(not test.passed for test in tests)
    if report.errors or failed:
        console.print(f"{report.errors} errors, {failed} failed distribution tests", style="red")
    else:
        console.print("nothing lost", style="green")
