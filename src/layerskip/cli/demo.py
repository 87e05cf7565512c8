"""`layerskip demo`: a model writes the same text in both ways, and a table says what that cost.

With --model smollm2, or by default where exit adapters for it come with the package, SmolLM2 answers questions. Else
the embedded model writes something like Python.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from layerskip.checkpoint.loading.config import CacheDType, Compute
from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments, parse
from layerskip.cli.terminal.terminal import draws, load_model, make_console, progress
from layerskip.decoding.config import GenerationConfig
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.decoding.output.events import GenerationResult
    from layerskip.language_model import LanguageModel

TALKING, TINY = "smollm2", "demo"
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that tells whether a number is prime.",
)
CODE = ("def fibonacci(n):", "import os\n\n\ndef read_file(path):")
MIN_REPETITIONS, MAX_REPETITIONS, ENOUGH_SECONDS = 3, 7, 5.0
EXPLANATION = """\
LayerSkip: the first {exit_layer}of this model's {num_layers} layers draft {num_speculations} tokens, then the
other layers verify them at once. What holds is kept, and the first token that doesn't is corrected: the text is exactly
the one that the model writes token by token, in fewer steps. {about}
"""
ABOUT = {
    TALKING: "The model is SmolLM2-135M-Instruct, as it was published.",
    TINY: "The model is tiny and learnt from Python's standard library: watch how it writes, not what.",
}


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Watch a model answer token by token, then with drafts, and see what both cost.

    The model is a tiny one that comes with the package; or SmolLM2, a real one. Exit code 1 if the texts differ.

    Example:
        layerskip demo --exit-layer 2 --num-speculations 3
    """

    model: Literal["smollm2", "demo"] | None = None
    """demo, the embedded model, which writes something like Python; or smollm2, which answers questions, and which is
    taken if it is installed and exit adapters for it come with the package."""
    exit_adapters: Annotated[Path | None, arg(metavar="DIR")] = None
    """A folder with exit adapters for the model."""
    exit_layer: int | None = None
    """Layers that draft (1..L). If neither this nor the next is given, both are chosen round by round."""
    num_speculations: int | None = None
    """Most tokens to draft in a round."""
    max_new_tokens: int = 128
    """Tokens to write after each of two prompts."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a CUDA GPU if there is one."""
    compute: Compute | None = None
    """The numbers that both ways multiply by; int8 is taken for SmolLM2 on a CPU where native kernels run it."""
    cache_dtype: CacheDType = "auto"
    """Type that keys and values are kept in."""
    output: OutputArguments = field(default_factory=OutputArguments)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is asked."""

    shown: str
    tokens: list[int]
    """The same in the chat template, where the model has one."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Both ways over all prompts: medians of interleaved repetitions."""

    prompts: list[Prompt]

    plain: "list[GenerationResult]"
    drafted: "list[GenerationResult]"
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    repetitions: int

    @property
    def speedup(self) -> float:
        """Self-speculative over autoregressive tokens per second."""
        return self.drafted_tokens_per_second / self.plain_tokens_per_second

    @property
    def same_text(self) -> bool:
        """Whether both wrote the same tokens after every prompt."""
        return [r.token_ids for r in self.plain] == [r.token_ids for r in self.drafted]


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(DemoArguments, "demo", argv)
    config = GenerationConfig(
        exit_layer=arguments.exit_layer,
        num_speculations=arguments.num_speculations,
        max_new_tokens=arguments.max_new_tokens,
    )
    model = arguments.model or choose_model(arguments.output)
    adapters = arguments.exit_adapters or "auto"
    loading = ModelArguments(
        model=model,
        device=arguments.device,
        dtype="float32",
        exit_adapters=adapters,
        compute=arguments.compute or choose_compute(model, arguments.device),
        cache_dtype=arguments.cache_dtype,
    )
    lm = load_model(loading, arguments.output)
    if model == TALKING:
        prompts = [Prompt(shown=text, tokens=lm.encode_chat([{"role": "user", "content": text}])) for text in QUESTIONS]
    else:
        prompts = [Prompt(shown=text, tokens=lm.encode([text])[0]) for text in CODE]
        config = replace(config, ignore_eos=True)
    if not arguments.output.json and not _show(lm, prompts, config, arguments.output):
        return ExitCode.INTERRUPTED
    with progress(arguments.output, "measuring both ways in turn, without showing them"):
        measurement = measure(lm, prompts, config)
    if arguments.output.json:
        print(to_json(record(lm, config, measurement)))
    else:
        _show_table(lm, measurement, arguments.output)
    return ExitCode.DONE if measurement.same_text else ExitCode.CHECK_FAILED


def choose_model(output: OutputArguments) -> str:
    """SmolLM2 if it is installed and exit adapters for it come with the package; else the embedded model."""
    from layerskip.checkpoint.checkpoint import ASSETS
    from layerskip.checkpoint.exit_adapters import has_adapters
    from layerskip.checkpoint.names import MODELS, is_installed

    if not has_adapters(ASSETS / TALKING):
        return TINY
    if is_installed(TALKING):
        return TALKING
    if not output.json:
        make_console(output).print(
            f"For a model that answers questions (SmolLM2, 98 MB), run: {MODELS[TALKING].install}",
            style="dim",
            soft_wrap=True,
        )
    return TINY


def choose_compute(model: str, device: str) -> Compute:
    """How the model multiplies: int8 where it is quantized, on a CPU with native kernels."""
    from layerskip.checkpoint.loading.placement import choose_device
    from layerskip.model.native.library import load_library

    native = choose_device(device).type == "cpu" and load_library() is not None
    return "int8" if native and model == TALKING else "float32"


def measure(lm: "LanguageModel", prompts: list[Prompt], config: GenerationConfig) -> Measurement:
    """Decode all prompts in both ways, in turn, after a warm-up; at least three times, then while time is left."""
    from layerskip.cli.terminal.summary import autoregressive, warm_up

    for prompt in prompts:
        warm_up(lm, prompt.tokens, config)
    ways = (autoregressive(config), config)
    results: list[list[GenerationResult]] = [[], []]
    speeds: list[list[float]] = [[], []]
    started = perf_counter()
    while len(speeds[0]) < MIN_REPETITIONS or (
        len(speeds[0]) < MAX_REPETITIONS and perf_counter() - started < ENOUGH_SECONDS
    ):
        for way, each in enumerate(ways):
            results[way] = [lm.generate([prompt.tokens], each)[0] for prompt in prompts]
            seconds = sum(result.stats.seconds for result in results[way])
            speeds[way].append(sum(result.stats.tokens for result in results[way]) / seconds)
    return Measurement(
        prompts=prompts,
        plain=results[0],
        drafted=results[1],
        plain_tokens_per_second=median(speeds[0]),
        drafted_tokens_per_second=median(speeds[1]),
        repetitions=len(speeds[0]),
    )


def record(lm: "LanguageModel", config: GenerationConfig, measurement: Measurement) -> dict[str, Any]:
    """The measurement for JSON."""
    from layerskip.cli.terminal.summary import result_record

    both = zip(measurement.prompts, measurement.plain, measurement.drafted, strict=True)
    return {
        "model": lm.checkpoint.name,
        "config": result_record(lm, config, measurement.drafted[0])["config"],
        "compute": lm.decoder.compute,
        "repetitions": measurement.repetitions,
        "autoregressive": {"tokens_per_second": measurement.plain_tokens_per_second},
        "self_speculative": {"tokens_per_second": measurement.drafted_tokens_per_second},
        "speedup": measurement.speedup,
        "same_text": measurement.same_text,
        "prompts": [
            {
                "prompt": prompt.shown,
                "text": drafted.text,
                "autoregressive": asdict(plain.stats),
                "self_speculative": asdict(drafted.stats),
                "same_text": plain.token_ids == drafted.token_ids,
            }
            for prompt, plain, drafted in both
        ],
    }


def _show(lm: "LanguageModel", prompts: list[Prompt], config: GenerationConfig, output: OutputArguments) -> bool:
    """Write after each prompt in both ways for all to see; False if the user stops it."""
    from layerskip.cli.terminal.painter import Painter
    from layerskip.cli.terminal.stream import follow, write_plain
    from layerskip.cli.terminal.summary import autoregressive, warm_up
    from layerskip.decoding.request import choose_exit_layer

    console = make_console(output)
    painter = Painter(console)
    adaptive = config.strategy == "adaptive"
    explanation = EXPLANATION.format(
        exit_layer="" if adaptive else f"{choose_exit_layer(config, lm.decoder)} ",
        num_layers=lm.decoder.num_layers,
        num_speculations="some" if adaptive else f"up to {config.draft_length}",
        about=ABOUT[lm.checkpoint.name],
    )
    console.print(explanation.replace("\n", " "), end="\n\n")
    warm_up(lm, prompts[0].tokens, config)
    for name, each in (("Token by token", autoregressive(config)), ("With drafts", config)):
        console.rule(name, align="left")
        if each.speculates and draws(output):
            painter.legend()
        for prompt in prompts:
            ends = "\n" if lm.checkpoint.name == TALKING else ""
            if draws(output):
                painter.prompt(prompt.shown + ends)
                shown = follow(lm.stream([prompt.tokens], each, show_drafts=True), painter.draw)
                painter.finish()
            else:
                print(prompt.shown, end=ends)
                shown = follow(lm.stream([prompt.tokens], each), write_plain)
                print()
            print()
            if shown.interrupted:
                return False
    return True


def _show_table(lm: "LanguageModel", measurement: Measurement, output: OutputArguments) -> None:
    from rich.table import Table

    from layerskip.cli.terminal.summary import difference, speculation_rows

    console = make_console(output)
    table = Table()
    table.add_column("")
    table.add_column("token by token", justify="right")
    table.add_column("with drafts", justify="right")
    table.add_row(
        "tokens/s", f"{measurement.plain_tokens_per_second:.1f}", f"{measurement.drafted_tokens_per_second:.1f}"
    )
    table.add_row("speed", "1.00x", f"{measurement.speedup:.2f}x", style="bold")
    calls = [sum(r.stats.layer_calls for r in results) for results in (measurement.plain, measurement.drafted)]
    table.add_row("layer calls", *(f"{number:,}" for number in calls))
    stats = [result.stats for result in measurement.drafted]
    rounds = max(sum(each.rounds for each in stats), 1)
    mean_length = sum(each.tokens - 1 for each in stats) / rounds
    accepted, drafted = sum(each.accepted for each in stats), sum(each.drafted for each in stats)
    for name, value in speculation_rows(accepted, drafted, mean_length):
        table.add_row(name, "", value)
    table.add_row("same text", "", "yes" if measurement.same_text else "NO")
    console.print(table)
    tokens = sum(each.tokens for each in stats)
    console.print(
        f"Measured on {lm.decoder.device} in {lm.decoder.compute} after a warm-up: medians of "
        f"{measurement.repetitions} repetitions in turn, {tokens} tokens each, prompts included in the time.",
        style="dim",
    )
    for plain, with_drafts in zip(measurement.plain, measurement.drafted, strict=True):
        if plain.token_ids != with_drafts.token_ids:
            console.print(difference(with_drafts.token_ids, plain.token_ids), style="bold red")
