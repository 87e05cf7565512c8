"""Reports of finished runs: one self-contained HTML file for each, and comparisons of runs of one kind.

    page.py       elements that escape their content; style.py, the style sheet
    plots.py      plots as SVG; heatmap.py, the heat map of a grid
    numbers.py    numbers as text
    parts.py      sections that all kinds have
    kinds/        the page of each kind; texts.py, texts with marked drafts
    compare.py    the page of a comparison

Fields that a run lacks are left out or shown as a dash.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.left_out import LEFT_OUT
from layerskip.evaluation.report.compare import Run, compare_page
from layerskip.evaluation.report.kinds.benchmark import benchmark_report
from layerskip.evaluation.report.kinds.eval import eval_report
from layerskip.evaluation.report.kinds.load import load_report
from layerskip.evaluation.report.kinds.sweep import sweep_report
from layerskip.evaluation.report.kinds.verify import verify_report
from layerskip.evaluation.report.page import Report, page
from layerskip.evaluation.run_folder import REPORT_FILE, RESULTS_FILE, read_results
from layerskip.files import write_atomically

KINDS: Mapping[str, Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], Report]] = {
    "benchmark": benchmark_report,
    "sweep": sweep_report,
    "eval": eval_report,
    "verify": verify_report,
    "bench-serve": load_report,
}
"""Kinds of runs that have reports, with the functions that make them."""
LABEL = 40
"""Characters of a run's name in comparisons, at most."""


def write_report(folder: Path) -> Path:
    """Write the report of a finished run into its folder, atomically.

    Args:
        folder: The run's folder.

    Returns:
        The file, `report.html`.

    Raises:
        InvalidArgumentError: The folder contains no finished run of a kind that has reports, or can't be written.
    """
    content, samples = _read(folder)
    return _write(folder / REPORT_FILE, KINDS[content["kind"]](content, samples))


def compare_reports(folders: Sequence[Path], output: Path) -> Path:
    """Write a page that shows runs of one kind side by side, with ratios to the first.

    Args:
        folders: Folders of at least two finished runs.
        output: The file to write; its folder must exist.

    Returns:
        The file.

    Raises:
        InvalidArgumentError: Fewer than two runs, runs of different kinds, no finished run, or the file can't be
            written.
    """
    if len(folders) < 2:
        raise InvalidArgumentError(f"{len(folders)} folders can't be compared; name at least two")
    contents = [_read(folder)[0] for folder in folders]
    kinds = [content["kind"] for content in contents]
    if len(set(kinds)) > 1:
        found = ", ".join(f"{folder}: {kind}" for folder, kind in zip(folders, kinds, strict=True))
        raise InvalidArgumentError(f"only runs of one kind can be compared, got {found}")
    runs = [Run(label=label, content=content) for label, content in zip(_labels(folders), contents, strict=True)]
    return _write(output, compare_page(runs))


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content, samples = read_results(folder)
    except AttributeError as error:  # JSON, but not an object
        raise InvalidArgumentError(f"{folder / RESULTS_FILE} holds no results; run the measurement again") from error
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArgumentError(f"{folder} holds a run of kind {kind!r}; reports are there for {', '.join(KINDS)}")
    if not isinstance(content.get("results"), dict):
        raise InvalidArgumentError(f"{folder / RESULTS_FILE} holds no results; run the measurement again")
    return content, [sample for sample in samples if isinstance(sample, dict) and LEFT_OUT not in sample]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of folders, shortened to their ends; paths if two names are equal, and numbers if two paths are."""
    names = [folder.resolve().name for folder in folders]
    names = [str(folder) if Counter(names)[name] > 1 else name for folder, name in zip(folders, names, strict=True)]
    names = [name if len(name) <= LABEL else "…" + name[1 - LABEL :] for name in names]
    return [f"{name} ({place})" if Counter(names)[name] > 1 else name for place, name in enumerate(names, start=1)]


def _write(path: Path, report: Report) -> Path:
    if path.is_dir():
        raise InvalidArgumentError(f"{path} is a folder; name a file for the report")
    try:
        write_atomically(path, page(report))
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} can't be written: {error.strerror}; name a file in a folder that exists and can be written"
        ) from error
    return path
