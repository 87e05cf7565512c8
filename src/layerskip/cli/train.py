"""`layerskip train`: train a model so that its early layers can already predict."""

import os
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import File, OutputArguments, Switch, parse
from layerskip.cli.terminal.terminal import make_console, progress, silence_libraries
from layerskip.cli.terminal.training_progress import TrainingProgress
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json
from layerskip.training.config import TrainingConfig
from layerskip.training.settings_file import read_settings

if TYPE_CHECKING:
    from layerskip.training.output.result import TrainingResult

BAR_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainingConfig):
    """Train a model with the LayerSkip recipe: layers are dropped, and early exits learn to predict.

    Go on with a trained model (--model), or start from scratch (--config). The result is a plain checkpoint of Hugging
    Face's format. With --exit-adapters the model stays as it is, and small blocks at these exits learn to draft.

    Example: layerskip train --config small --data python-stdlib --output runs/small --max-steps 2000
    """

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the run: checkpoints, log, and in the end the trained model."""
    resume: Switch = False
    """Go on from the last checkpoint in the output folder, with the same settings."""
    toml: File = None
    """Settings from a file; flags come on top. Every run leaves its own as DIR/training.toml."""
    printing: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = read_arguments(argv)
    if arguments.output is None:
        raise InvalidArgumentError("output is missing: name the folder of the run with --output DIR")
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun and accelerate number the processes
    printing = arguments.printing if is_main else replace(arguments.printing, json=True)
    with progress(printing, "starting"):
        silence_libraries(bars=False)
        from layerskip.training.run import train
    config = TrainingConfig(**{name: getattr(arguments, name) for name in TrainingConfig.__dataclass_fields__})
    with TrainingProgress(printing) as bar:
        result = train(config, arguments.output, resume=arguments.resume, on_step=bar.step, on_message=bar.message)
    if is_main:
        _report(arguments, result)
    return ExitCode.INTERRUPTED if result.interrupted else ExitCode.DONE


def read_arguments(argv: Sequence[str]) -> TrainArguments:
    """Arguments from the command line, on top of those of a TOML file if it names one."""
    file = _toml_file(argv)
    if file is None:
        return parse(TrainArguments, "train", argv)
    settings = read_settings(file, TrainingConfig)
    base = TrainArguments(**{name: getattr(settings, name) for name in TrainingConfig.__dataclass_fields__})
    return parse(TrainArguments, "train", argv, default=base)


def _toml_file(argv: Sequence[str]) -> Path | None:
    """The file alone: flags that go with its settings may not go with the defaults."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--toml", type=Path)
    try:
        file: Path | None = parser.parse_known_args(argv)[0].toml
    except ArgumentError:  # the whole command line's error says more
        return None
    return file


def _report(arguments: TrainArguments, result: "TrainingResult") -> None:
    from layerskip.training.output.plot import plot_agreement

    plot = None
    if result.exits:
        plot = plot_agreement(result.exits, Path(result.output))
    if arguments.printing.json:
        print(to_json({**asdict(result), "plot": None if plot is None else str(plot)}))
        return
    console = make_console(arguments.printing)
    if result.interrupted:
        stopped = f"stopped after step {result.step}; its checkpoint is in {result.output}: go on with --resume"
        console.print(stopped, soft_wrap=True)
        return
    if result.exits:
        from rich.table import Table

        table = Table(title="exits, on the held-out data")
        for name in ("exit layer", "loss (nats)", "agreement"):
            table.add_column(name, justify="right")
        table.add_column("with the last layer")
        table.add_column("ideal speedup", justify="right")
        block = "#" if console.options.ascii_only else "█"
        for quality, speedup in zip(result.exits, result.speedups, strict=True):
            bar = block * round(quality.agreement * BAR_WIDTH)
            table.add_row(
                str(quality.exit_layer),
                f"{quality.loss:.3f}",
                f"{quality.agreement:.1%}",
                bar,
                f"{speedup.speedup:.2f} (K = {speedup.num_speculations})",
            )
        console.print(table)
    console.print(f"{result.step} steps, {result.num_tokens} tokens, {result.seconds:.0f} s")
    if too_long := result.long_examples.describe(arguments.data.sequence_length):
        console.print(too_long, soft_wrap=True)
    if plot is not None:
        console.print(f"agreement by exit: {plot}", soft_wrap=True)
    if arguments.adapters.exit_adapters:
        hint = f"try layerskip generate --model {arguments.start.model} --exit-adapters {result.output}"
        console.print(f"the exit adapters are in {result.output}: {hint}", soft_wrap=True)
        return
    hint = f"the model is in {result.output}: try layerskip generate --model {result.output}"
    if len(result.speedups) > 1:  # the last exit is the model itself
        best = max(result.speedups[:-1], key=lambda speedup: speedup.speedup)
        hint += f" --exit-layer {best.exit_layer}"
    console.print(hint, soft_wrap=True)
