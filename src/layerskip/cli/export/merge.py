"""`layerskip export merge`: a model and its exit adapters in one folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import NamedModel, OutputArguments, parse
from layerskip.cli.terminal.terminal import make_console, open_model, progress
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Write a folder with a model and its exit adapters, which layerskip loads by the folder's name alone.

    The model's files are linked, not copied, where the file system allows it. Adapters for different exits may come
    from different folders. layerskip export split takes them out again.

    Example: layerskip export merge --model smollm2 --output smollm2-with-adapters
    """

    model: NamedModel = field(default_factory=NamedModel)
    exit_adapters: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR ...]")] = ()
    """Folders with exit adapters for this very model; if not given, the adapters that belong to the model."""
    folder: Annotated[Path, arg(name="output", metavar="DIR")]
    """The folder to write: a new one, or an empty one."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the subcommand."""
    arguments = parse(MergeArguments, "export merge", argv)
    checkpoint = open_model(arguments.model, arguments.output)

    from layerskip.export.adapters import merge_adapters

    with progress(arguments.output, f"writing {arguments.folder}"):
        result = merge_adapters(checkpoint, arguments.exit_adapters, arguments.folder)
    if arguments.output.json:
        print(to_json(asdict(result)))
        return ExitCode.DONE
    console = make_console(arguments.output)
    exits = ", ".join(map(str, result.exits))
    console.print(
        f"{result.output}: {result.base} with exit adapters at {exits}, {result.num_bytes / 1e6:.1f} MB, "
        f"{result.num_linked} files linked: try layerskip generate --model {result.output}",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return ExitCode.DONE
