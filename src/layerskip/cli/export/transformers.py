"""`layerskip export transformers`: self-speculative decoding for transformers, where this package isn't installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import OutputArguments, parse
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class ExportTransformersArguments:
    """Write a folder for transformers' `generate(custom_generate=DIR)`: the first layers draft, the others verify.

    Works with decoder-only models of transformers, in environments without layerskip. With --model, the model's tuned
    or trained exit becomes the default; and if the model is a folder of Hugging Face's format, its files are linked
    into the new folder, so that a model loaded from there always generates this way.

    Example: layerskip export transformers --model demo --output exported
    """

    output_folder: Annotated[Path, arg(name="output", metavar="DIR")]
    """The folder to write; it must not exist yet, or be empty."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """A model as in other commands: demo, smollm2, gemma3-270m, a folder, a GGUF file, or a hub id (owner/name)."""
    revision: Annotated[str | None, arg(metavar="NAME")] = None
    """Branch, tag or commit of a hub repository."""
    exit_layer: Annotated[int | None, arg(metavar="E")] = None
    """Layers that draft by default; if not given, as tuned or trained, or else a third of the model's."""
    num_speculations: Annotated[int | None, arg(metavar="K")] = None
    """Tokens drafted in one round by default; if not given, as tuned, or else 4."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(ExportTransformersArguments, "export transformers", argv)

    from layerskip.checkpoint.checkpoint import open_checkpoint
    from layerskip.export.custom_generation import write_custom_generation

    checkpoint = None if arguments.model is None else open_checkpoint(arguments.model, revision=arguments.revision)
    written = write_custom_generation(
        arguments.output_folder,
        checkpoint,
        exit_layer=arguments.exit_layer,
        num_speculations=arguments.num_speculations,
    )
    if arguments.output.json:
        report = {
            "folder": str(written.folder),
            "exit_layer": written.exit_layer,
            "num_speculations": written.num_speculations,
            "has_model": written.has_model,
            "snippet": written.snippet,
        }
        print(to_json(report))
    else:
        content = "model and code" if written.has_model else "code"
        print(f"{written.folder}: {content} for transformers\n\n{written.snippet}")
    return ExitCode.DONE
