"""`layerskip inspect`: what a checkpoint is, and what each of its exits is worth on a text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import File, ModelArguments, OutputArguments, Switch, Text, parse
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import load_model, make_console
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.checkpoint.contents import Contents
    from layerskip.evaluation.inspect.exits import ExitReport
    from layerskip.language_model import LanguageModel

BAR_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Show a checkpoint's shape, and the loss of each exit and its agreement with the last layer on a text.

    With --memory: what the model needs of memory, and what fits; its weights aren't read.

    Example: layerskip inspect --model demo --text article.txt
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    text: File = None
    """A text file, or a .jsonl file with a text in each line; a Python file of our own if not given."""
    field: Annotated[str | None, arg(metavar="NAME")] = None
    """Field of the .jsonl file that holds the text; 'text' if not given."""
    prompt: Text = None
    """The text itself, in place of a file."""
    limit: int | None = None
    """Most lines of the .jsonl file to use."""
    max_tokens: int | None = None
    """Read no more than this many tokens in all; a few thousand give a good picture."""
    memory: Switch = False
    """Show what weights, cache and prompts need of memory, and what fits, without loading the model."""
    batch_size: int = 1
    """Sequences at a time, for --memory."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(InspectArguments, "inspect", argv)
    if arguments.memory:
        from layerskip.cli.measuring.memory import show_memory

        check_alone(arguments)
        show_memory(arguments.model, arguments.output, arguments.batch_size)
        return ExitCode.DONE
    if arguments.batch_size != 1:
        raise InvalidArgumentError("--batch-size is for --memory; texts are read one at a time")
    texts = read_texts(arguments)
    lm = load_model(arguments.model, arguments.output)

    from layerskip.evaluation.inspect.exits import measure_exits

    tokens = cut(lm.encode(texts), arguments.max_tokens)
    with show_progress(arguments.output, "reading tokens") as on_progress:
        report = measure_exits(lm, tokens, on_progress=on_progress)
    if arguments.output.json:
        print(to_json({"model": describe(lm), **asdict(report)}))
    else:
        print_report(arguments, lm, report)
    return ExitCode.DONE


def check_alone(arguments: InspectArguments) -> None:
    """Raise `InvalidArgumentError` if --memory comes with options of reading a text."""
    for name in ("text", "field", "prompt", "limit", "max_tokens"):
        if getattr(arguments, name) is not None:
            raise InvalidArgumentError(f"--memory reads no text; give it or --{name.replace('_', '-')}, not both")


def read_texts(arguments: InspectArguments) -> list[str]:
    """The texts to measure on."""
    from layerskip.evaluation.data.prompts import read_prompts

    if arguments.prompt is not None and arguments.text is not None:
        raise InvalidArgumentError("give either a text or a file, not both")
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.text is None:
        import layerskip.decoding.engine as sample

        return [Path(sample.__file__).read_text(encoding="utf-8")]
    field = arguments.field or ("text" if Path(arguments.text).suffix == ".jsonl" else None)
    return read_prompts(Path(arguments.text), field=field, limit=arguments.limit)


def cut(texts: list[list[int]], max_tokens: int | None) -> list[list[int]]:
    """The first `max_tokens` tokens of all texts together.

    Raises:
        InvalidArgumentError: Too few to predict one from another.
    """
    if max_tokens is None:
        return texts
    if max_tokens < 2:
        raise InvalidArgumentError(f"max_tokens must be at least 2, got {max_tokens}")
    kept: list[list[int]] = []
    for text in texts:
        kept.append(text[:max_tokens])
        max_tokens -= len(kept[-1])
    return [text for text in kept if text]


def describe(lm: "LanguageModel") -> dict[str, Any]:
    """Shape of the model, as `--json` prints it."""
    config = lm.config
    return {
        "name": lm.checkpoint.name,
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "max_context": lm.decoder.max_context,
        "tie_word_embeddings": config.tie_word_embeddings,
        "parameters": lm.checkpoint.num_parameters,
        "dtype": str(lm.decoder.dtype).removeprefix("torch."),
        "device": str(lm.decoder.device),
        "kernels": lm.decoder.kernels,
        "exit_adapters": None if lm.exit_adapters is None else lm.exit_adapters.to_json(),
        "files": asdict(lm.checkpoint.contents),
    }


def describe_files(contents: "Contents") -> str:
    """The files' format, bytes and types in a sentence."""
    types = ", ".join(
        f"{share.num_tensors} {name} ({share.num_bytes / 1e6:.1f} MB)" for name, share in contents.types.items()
    )
    return f"{contents.format}, {contents.num_bytes / 1e6:.1f} MB; tensors: {types}"


def print_report(arguments: InspectArguments, lm: "LanguageModel", report: "ExitReport") -> None:
    """The model's shape, a table of exits, and a verdict."""
    from rich.table import Table

    console = make_console(arguments.output)
    shape = describe(lm)
    console.print(
        f"{shape['name']}: {shape['model_type']}, {shape['parameters'] / 1e6:.1f}M parameters, "
        f"{shape['num_layers']} layers, width {shape['hidden_size']}, vocabulary {shape['vocab_size']}, "
        f"context {shape['max_context']}, {shape['dtype']} on {shape['device']}, {shape['kernels']} kernels"
    )
    console.print(describe_files(lm.checkpoint.contents), style="dim")
    adapted = lm.decoder.adapted_exits
    if lm.exit_adapters is not None:
        exits, folder = " and ".join(map(str, adapted)), lm.exit_adapters.folder
        console.print(f"exit adapters at {exits}, from {folder}", style="dim", soft_wrap=True)
    table = Table(title=f"exits, over {report.num_tokens} tokens")
    table.add_column("exit layer", justify="right")
    table.add_column("loss (nats)", justify="right")
    table.add_column("agreement", justify="right")
    table.add_column("with the last layer")
    block = "#" if console.options.ascii_only else "█"
    for quality in report.exits:
        bar = block * round(quality.agreement * BAR_WIDTH)
        name = f"adapter {quality.exit_layer}" if quality.exit_layer in adapted else str(quality.exit_layer)
        table.add_row(name, f"{quality.loss:.3f}", f"{quality.agreement:.1%}", bar)
    console.print(table)
    if report.recipe is not None:
        console.print(f"config.json names its early-exit training: {report.recipe}")
    if adapted:
        console.print("The exit adapters draft for this model; its other exits are those of the model as it is.")
    elif report.trained_for_early_exit:
        console.print("Early layers predict well: this model was made for early exit, speculation will pay.")
    else:
        console.print(
            "Early layers rarely agree with the last one: this model was not trained for early exit, "
            "or this text is unlike its training data; self-speculation will hardly pay."
        )
