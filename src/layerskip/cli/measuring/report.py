"""`layerskip report`: a finished run as a page, or several side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import OutputArguments, parse
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write the report of a finished run again, or compare several runs of one kind.

    One folder: its report.html. Several: one page with all of them, and ratios to the first. A page is a single file
    that loads nothing.

    Example: layerskip report runs/before runs/after --output comparison.html
    """

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]")]
    """Folders that benchmark, sweep, eval, verify or bench-serve wrote."""
    output_file: Annotated[Path | None, arg(name="output", metavar="FILE")] = None
    """Where a comparison goes; report.html if not given."""
    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(ReportArguments, "report", argv)

    from layerskip.evaluation.report import compare_reports, write_report

    if not arguments.folders:
        raise InvalidArgumentError("no folder was given; name one for its report, or several to compare them")
    if len(arguments.folders) == 1:
        if arguments.output_file is not None:
            raise InvalidArgumentError(
                "--output is for comparisons; the report of a single run goes into its folder, as report.html"
            )
        path = write_report(arguments.folders[0])
    else:
        path = compare_reports(arguments.folders, arguments.output_file or Path("report.html"))
    print(to_json({"report": str(path)}) if arguments.output.json else path)
    return ExitCode.DONE
