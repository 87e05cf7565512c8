"""`layerskip export push`: upload a folder to the Hugging Face hub, with a model card of measured results."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import OutputArguments, Switch, parse
from layerskip.cli.terminal.terminal import is_terminal, make_console, progress, silence_libraries
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Upload a model, exit adapters or GGUF files to the Hugging Face hub, in one commit.

    The model card has what was measured: agreement by exit, the best setting, speed, and the training recipe. It is
    made of the files in the folder and of --results; what wasn't measured isn't in it.

    Example: layerskip export push --folder runs/small --repo owner/name --results runs/benchmark --dry-run
    """

    folder: Annotated[Path, arg(metavar="DIR")]
    """The folder to upload. Checkpoints and logs of a training run in it stay here."""
    repo: Annotated[str, arg(metavar="OWNER/NAME")]
    """The repository; made if there is none."""
    results: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]")] = ()
    """Folders of layerskip benchmark and sweep, and files with the output of layerskip inspect --json."""
    private: Switch = False
    """Make a private repository, if there is none yet."""
    dry_run: Switch = False
    """Print the card and the names of the files, and upload nothing."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the subcommand."""
    arguments = parse(PushArguments, "export push", argv)
    silence_libraries(bars=not arguments.output.json and is_terminal(sys.stderr))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every request that it repeats

    from layerskip.export.hub.push import check_token, plan_push, push

    if not arguments.dry_run:
        check_token()
    result = plan_push(arguments.folder, arguments.repo, arguments.results, private=arguments.private)
    if not arguments.dry_run:
        with progress(arguments.output, f"uploading {len(result.files)} files"):
            result = push(arguments.folder, result)
    if arguments.output.json:
        print(to_json(asdict(result)))
        return ExitCode.DONE
    console = make_console(arguments.output)
    size = f"{len(result.files)} files, {result.num_bytes / 1e6:.1f} MB"
    if result.url is None:
        console.print(result.card, soft_wrap=True)
        console.print(f"{size} would be uploaded to {result.repo}: {', '.join(result.files)}", soft_wrap=True)
    else:
        console.print(f"{size} uploaded: {result.url}", soft_wrap=True)
    return ExitCode.DONE
