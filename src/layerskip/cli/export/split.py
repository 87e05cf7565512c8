"""`layerskip export split`: a model's exit adapters in a folder of their own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import NamedModel, OutputArguments, parse, parse_numbers
from layerskip.cli.terminal.terminal import make_console, open_model
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class SplitArguments:
    """Write a model's exit adapters into a folder of their own, without the model.

    The folder names the model, and recognises its weights by their hash.

    Example: layerskip export split --model smollm2-with-adapters --output adapters --base HuggingFaceTB/SmolLM2-135M
    """

    model: NamedModel = field(default_factory=NamedModel)
    folder: Annotated[Path, arg(name="output", metavar="DIR")]
    """The folder to write: a new one, or an empty one."""
    exits: Annotated[str | None, arg(metavar="E,E,...")] = None
    """Exits whose adapters are taken, such as 2,4; all if not given."""
    base: Annotated[str | None, arg(metavar="NAME")] = None
    """What the model is called in the adapters' description, such as its hub id; if not given, as it is."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the subcommand."""
    arguments = parse(SplitArguments, "export split", argv)
    exits = [] if arguments.exits is None else parse_numbers("--exits", arguments.exits)
    checkpoint = open_model(arguments.model, arguments.output)

    from layerskip.export.adapters import split_adapters

    result = split_adapters(checkpoint, arguments.folder, exits=exits, base=arguments.base)
    if arguments.output.json:
        print(to_json(asdict(result)))
        return ExitCode.DONE
    console = make_console(arguments.output)
    console.print(
        f"{result.output}: exit adapters at {', '.join(map(str, result.exits))} for {result.base} "
        f"({result.weights_hash[:12]}), {result.num_bytes / 1e6:.1f} MB: try layerskip generate --model {result.base} "
        f"--exit-adapters {result.output}",
        soft_wrap=True,
    )
    return ExitCode.DONE
