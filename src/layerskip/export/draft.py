"""The first layers of a model as a checkpoint of their own: a draft model for engines that take one."""

import json
from dataclasses import dataclass
from pathlib import Path

from layerskip.checkpoint.checkpoint import DEMO_NAME, Checkpoint
from layerskip.checkpoint.hub import TOKENIZER_PATTERNS
from layerskip.checkpoint.loading.placement import DTYPES
from layerskip.checkpoint.loading.tensors import EMBEDDING, Part, parameter_count, tensor_shapes
from layerskip.checkpoint.names import MODELS
from layerskip.checks import whole_number
from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.export.commands import EngineCommand, engine_commands
from layerskip.export.first_layers import adapter_notes, first_layers
from layerskip.export.places import link_or_copy, new_folder
from layerskip.export.weights import bytes_to_write, plan_files, write_files

NUM_SPECULATIONS = 4
"""Drafts in the commands where no sweep has found a number."""
OTHER_TOKENIZER_FILES = ("tekken.json", "additional_chat_templates")
"""What belongs to some tokenizers besides `hub.TOKENIZER_PATTERNS`."""
SMALL_FILES = 32 << 20
"""Bytes set aside for the tokenizer and the configuration."""


@dataclass(frozen=True, kw_only=True)
class DraftExport:
    """A draft model that was written."""

    output: str
    """Its folder."""
    model: str
    """The whole model, as the user called it."""
    exit_layer: int
    """E, its layers."""
    num_layers: int
    """L, the model's."""
    num_parameters: int
    num_bytes: int
    """Bytes of all its files but README.md, linked ones included."""
    num_linked: int
    """Files that are links to the model's own."""
    notes: tuple[str, ...]
    commands: tuple[EngineCommand, ...]


def export_draft(
    checkpoint: Checkpoint,
    exit_layer: int,
    output: Path,
    *,
    dtype: str = "auto",
    num_speculations: int | None = None,
) -> DraftExport:
    """Write a model's first layers, final norm, head and tokenizer in Hugging Face's format.

    Args:
        checkpoint: The model, in any format; weights in blocks are dequantized.
        exit_layer: E layers, 1..L.
        output: The folder; a new or an empty one.
        dtype: Type of the weights; `auto`: as in the files, and float32 for weights in blocks.
        num_speculations: K in the engines' commands; a sweep's best for this exit, or 4 if not given.

    Raises:
        InvalidArgumentError: There is no such exit, or `output` isn't empty or can't be written.
        CheckpointError: The model's files are damaged, or the disk is full.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgumentError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    asked = None if dtype == "auto" else DTYPES[dtype]
    drafts = _num_speculations(checkpoint, exit_layer, num_speculations)
    raw, config = first_layers(checkpoint, exit_layer)
    stored = asked or checkpoint.weights.get(EMBEDDING, Part.rows(0, 1)).dtype
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(stored).removeprefix("torch.")
    files = plan_files(checkpoint.weights, tensor_shapes(config), asked)
    notes = [*adapter_notes(checkpoint, exit_layer), *_base_notes(checkpoint)]
    commands = engine_commands(
        model=_model_for_engines(checkpoint),
        source=checkpoint.name,
        draft=str(output),
        exit_layer=exit_layer,
        num_speculations=drafts,
    )
    with new_folder(output, bytes_to_write(files, output) + SMALL_FILES) as folder:
        linked = write_files(checkpoint.weights, files, folder, asked)
        linked += _write_small_files(checkpoint, folder, notes)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        result = DraftExport(
            output=str(output),
            model=checkpoint.name,
            exit_layer=exit_layer,
            num_layers=checkpoint.config.num_layers,
            num_parameters=parameter_count(config),
            num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            num_linked=linked,
            notes=tuple(notes),
            commands=commands,
        )
        (folder / "README.md").write_text(_readme(result), encoding="utf-8")
    return result


def _write_small_files(checkpoint: Checkpoint, folder: Path, notes: list[str]) -> int:
    """Write tokenizer and settings of generation, and note a tokenizer that is missing; returns the number of links."""
    linked = int(_write_generation_config(checkpoint, folder))
    try:
        linked += write_tokenizer(checkpoint, folder)
    except TokenizerError as error:
        notes.append(f"the model has no tokenizer that can be written ({error}); engines need one: add it")
    return linked


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> int:
    """Link a checkpoint's tokenizer files into a folder, or write the tokenizer if there are no such files.

    Returns:
        Number of files that are links.

    Raises:
        TokenizerError: There is no tokenizer, or it can't be read.
    """
    source = checkpoint.hugging_face_folder
    if source is None:
        checkpoint.tokenizer.save_pretrained(folder)
        return 0
    linked = 0
    for pattern in (*TOKENIZER_PATTERNS, *OTHER_TOKENIZER_FILES):
        for path in sorted(source.glob(pattern)):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                linked += link_or_copy(file, target)
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
        raise TokenizerError(f"{source} has no tokenizer.json")
    return linked


def _write_generation_config(checkpoint: Checkpoint, folder: Path) -> bool:
    """Write the settings of generation; returns whether the file is a link."""
    name, source = "generation_config.json", checkpoint.hugging_face_folder
    if source is not None:
        return (source / name).is_file() and link_or_copy(source / name, folder / name)
    ids = {
        key: value for key in ("bos_token_id", "pad_token_id") if (value := checkpoint.raw_config.get(key)) is not None
    }
    settings = {**ids, **checkpoint.generation_config}
    (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return False


def _num_speculations(checkpoint: Checkpoint, exit_layer: int, given: int | None) -> int:
    if given is not None:
        return whole_number("num_speculations", given, least=1)
    tuned = checkpoint.tuned
    return tuned.num_speculations if tuned is not None and tuned.exit_layer == exit_layer else NUM_SPECULATIONS


def _model_for_engines(checkpoint: Checkpoint) -> str:
    """The whole model in Hugging Face's format: a folder or a hub id, or a word in its place where there is none."""
    if checkpoint.name in MODELS:
        return MODELS[checkpoint.name].hub_id
    if checkpoint.hugging_face_folder is None:
        return "MODEL"
    return str(checkpoint.hugging_face_folder) if checkpoint.name == DEMO_NAME else checkpoint.name


def _base_notes(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.hugging_face_folder is not None or checkpoint.name in MODELS:
        return []
    return [
        f"{checkpoint.name} is a GGUF file; for engines that can't read it, layerskip export draft --exit-layer "
        f"{checkpoint.config.num_layers} writes the whole model in Hugging Face's format: put its folder in the place "
        "of MODEL"
    ]


def _readme(result: DraftExport) -> str:
    lines = [
        f"# Draft model: the first {result.exit_layer} of {result.num_layers} layers of {result.model}",
        "",
        f"{result.num_parameters / 1e6:.1f}M parameters: the first layers, the final norm, the head and the tokenizer "
        "of the whole model. By itself it writes poor text. In engines with speculative decoding it proposes tokens, "
        "the whole model verifies them, and the text is the whole model's.",
        "",
    ]
    for note in result.notes:
        lines += [f"Note: {note}.", ""]
    if result.num_linked:
        lines += [
            "Files that are the same as the model's are hard links to them: replace such a file, don't edit it.",
            "",
        ]
    for command in result.commands:
        language = "python" if command.engine == "transformers" else "sh"
        lines += [f"## {command.engine}", f"```{language}", command.command, "```", ""]
        if command.remark:
            lines += [f"{command.remark[0].upper()}{command.remark[1:]}.", ""]
    return "\n".join(lines)
