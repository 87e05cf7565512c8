"""`layerskip export draft`: the first layers of a model as a draft model for other engines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import NamedModel, OutputArguments, parse
from layerskip.cli.terminal.terminal import make_console, open_model, progress
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.export.draft import DraftExport


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """Write the first layers of a model, its final norm, head and tokenizer as a checkpoint of Hugging Face's format.

    The checkpoint is a draft model of the whole one for vLLM, SGLang, TensorRT-LLM and transformers. The commands are
    printed, and stand in its README.md.

    Example: layerskip export draft --model demo --exit-layer 4 --output demo-draft
    """

    model: NamedModel = field(default_factory=NamedModel)
    exit_layer: Annotated[int, arg(metavar="E")]
    """Number of layers to keep."""
    folder: Annotated[Path, arg(name="output", metavar="DIR")]
    """The folder to write: a new one, or an empty one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of the weights; auto: as in the model's files, and float32 for those that are quantized."""
    num_speculations: Annotated[int | None, arg(metavar="K")] = None
    """Number of drafts in the printed commands; if not given, the number that a sweep found best, or 4."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the subcommand."""
    arguments = parse(DraftArguments, "export draft", argv)
    checkpoint = open_model(arguments.model, arguments.output)

    from layerskip.export.draft import export_draft

    with progress(arguments.output, f"writing {arguments.folder}"):
        result = export_draft(
            checkpoint,
            arguments.exit_layer,
            arguments.folder,
            dtype=arguments.dtype,
            num_speculations=arguments.num_speculations,
        )
    if arguments.output.json:
        print(to_json(asdict(result)))
    else:
        print_export(arguments, result)
    return ExitCode.DONE


def print_export(arguments: DraftArguments, result: "DraftExport") -> None:
    """The result, notes, and a command for each engine."""
    console = make_console(arguments.output)
    linked = f", {result.num_linked} of its files linked" if result.num_linked else ""
    console.print(
        f"{result.output}: the first {result.exit_layer} of {result.num_layers} layers, "
        f"{result.num_parameters / 1e6:.1f}M parameters, {result.num_bytes / 1e6:.1f} MB{linked}",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for command in result.commands:
        console.print(f"\n{command.engine}:", style="bold")
        console.print(command.command, soft_wrap=True)
        if command.remark:
            console.print(f"({command.remark})", soft_wrap=True)
