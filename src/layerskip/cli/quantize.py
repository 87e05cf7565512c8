"""`layerskip quantize`: saves a checkpoint in fewer bits, and shows what that changes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import File, ModelArguments, OutputArguments, parse
from layerskip.cli.measuring.inspect import InspectArguments, cut, read_texts
from layerskip.cli.terminal.progress import show_progress
from layerskip.cli.terminal.terminal import late_bar, make_console, open_model, progress
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.evaluation.quantization import Comparison


@dataclass(frozen=True, kw_only=True)
class QuantizeArguments:
    """Save a checkpoint's weights in 8 or 4 bits, and compare loss, agreement and accepted drafts with the original.

    The result is a folder in the layout of compressed-tensors, which loads with the weights that --quantize makes.

    Example: layerskip quantize --model demo --quantize int8 --output demo-int8
    """

    model: ModelArguments = default(default_factory=ModelArguments)
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder of the new checkpoint; it must be empty, or not exist."""
    text: File = None
    """A text file to compare on, or a .jsonl file with a text in each line; a Python file of our own if not given."""
    max_tokens: int = 2048
    """Read no more than this many tokens of it."""
    printed: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(QuantizeArguments, "quantize", argv)
    printed, quantize, output = arguments.printed, arguments.model.quantize, arguments.output.expanduser()
    checkpoint = open_model(arguments.model, printed)

    from layerskip.checkpoint.checkpoint import Checkpoint
    from layerskip.checkpoint.loading.plan import choose_plan
    from layerskip.checkpoint.writing.quantized import check_writable, write_quantized
    from layerskip.evaluation.quantization import compare, measure
    from layerskip.language_model import LanguageModel

    check_writable(checkpoint, quantize, output)
    assert quantize is not None
    loading = replace(arguments.model, quantize=None)
    choose_plan(checkpoint, loading)  # wrong options are found before there is work
    texts = read_texts(InspectArguments(text=arguments.text))
    with progress(printed, f"loading {checkpoint.name}"):
        lm = LanguageModel.of(checkpoint, loading)
    tokens = cut(lm.encode(texts), arguments.max_tokens)
    with show_progress(printed, "reading tokens") as on_progress:
        before = measure(lm, tokens, on_progress=on_progress)
    del lm
    with late_bar(printed, "quantizing") as report:
        write_quantized(checkpoint, quantize, output, report)
    with progress(printed, f"loading {output}"):
        lm = LanguageModel.of(Checkpoint.in_folder(output), loading)
    with show_progress(printed, "reading tokens") as on_progress:
        after = measure(lm, tokens, on_progress=on_progress)
    comparison = compare(before, after)
    sizes = {"bytes_before": checkpoint.contents.num_bytes, "bytes_after": lm.checkpoint.contents.num_bytes}
    if printed.json:
        print(
            to_json(
                {"model": checkpoint.name, "quantize": quantize, "output": str(output), **sizes, **asdict(comparison)}
            )
        )
    else:
        print_comparison(arguments, comparison, sizes)
    return ExitCode.DONE


def print_comparison(arguments: QuantizeArguments, comparison: "Comparison", sizes: dict[str, Any]) -> None:
    """The table, and where the result is."""
    from rich.table import Table

    console = make_console(arguments.printed)
    table = Table(title=f"{arguments.model.quantize}, over {comparison.num_tokens} tokens")
    table.add_column("exit layer", justify="right")
    for column in ("loss (nats)", "in fewer bits", "agreement", "in fewer bits"):
        table.add_column(column, justify="right")
    for row in comparison.exits:
        table.add_row(
            str(row.exit_layer),
            f"{row.before.loss:.3f}",
            f"{row.after.loss:.3f}",
            f"{row.before.agreement:.1%}",
            f"{row.after.agreement:.1%}",
        )
    console.print(table)
    before, after = comparison.drafts_before, comparison.drafts_after
    console.print(
        f"accepted of {before.num_speculations} drafts at exit {before.exit_layer}: {before.accepted:.1%} before, "
        f"{after.accepted:.1%} in fewer bits"
    )
    before_mb, after_mb = sizes["bytes_before"] / 1e6, sizes["bytes_after"] / 1e6
    console.print(f"{arguments.output}: {after_mb:.1f} MB, {before_mb:.1f} MB before", soft_wrap=True)
