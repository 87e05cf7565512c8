"""`layerskip export gguf`: a model, or its first layers, as a GGUF file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import NamedModel, OutputArguments, parse
from layerskip.cli.terminal.terminal import make_console, open_model, progress
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class GGUFArguments:
    """Write a model as a GGUF file for llama.cpp, with its tokenizer and chat template.

    With --exit-layer, the file has the first layers only: a draft model of the whole one (llama-server -md FILE).

    Example: layerskip export gguf --model demo --exit-layer 4 --output draft.gguf
    """

    model: NamedModel = field(default_factory=NamedModel)
    file: Annotated[Path, arg(name="output", metavar="FILE")]
    """The file to write; it must not exist."""
    exit_layer: Annotated[int | None, arg(metavar="E")] = None
    """Number of layers to keep; all if not given."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16"
    """Type of the matrices; with q4_0, embedding and head are q8_0. Norms and biases are f32."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the subcommand."""
    arguments = parse(GGUFArguments, "export gguf", argv)
    checkpoint = open_model(arguments.model, arguments.output)

    from layerskip.export.gguf.write import export_gguf

    with progress(arguments.output, f"writing {arguments.file}"):
        result = export_gguf(checkpoint, arguments.file, exit_layer=arguments.exit_layer, type_name=arguments.type)
    if arguments.output.json:
        print(to_json(asdict(result)))
        return ExitCode.DONE
    console = make_console(arguments.output)
    part = "all" if result.exit_layer == result.num_layers else f"the first {result.exit_layer} of"
    types = ", ".join(f"{count} {name}" for name, count in result.types.items())
    console.print(
        f"{result.output}: {part} {result.num_layers} layers, {result.architecture}, {result.num_bytes / 1e6:.1f} MB; "
        f"tensors: {types}",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return ExitCode.DONE
