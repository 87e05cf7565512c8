"""Many prompts from a file of JSON lines: decoded in batches, kept as they come, written in order at the end.

A line's text depends on the line, its place, the model and the configuration, and on nothing else: its seed comes from
the run's and its place (`line_seed`), and rows of a batch don't know of one another. Two exceptions: with `rejection`
acceptance a text also depends on the plans of adaptive decoding, and kernels that round a product of several rows
otherwise than that of one (those of torch) may swap two tokens of nearly the same score.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerskip.batch.lines import Line
from layerskip.batch.results import PartialResults
from layerskip.batch.worker import BatchWork
from layerskip.errors import InvalidArgumentError
from layerskip.workers.fan_out import Mapper, in_process


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What was done."""

    lines: int
    """Lines of the output."""
    resumed: int
    """Of these, lines that an earlier run had finished."""
    errors: int
    """Lines that couldn't be decoded."""
    tokens: int
    """Tokens of all lines."""
    seconds: float
    """Of this run, without loading."""
    tokens_per_second: float
    """Of this run."""


def run_batch(
    work: BatchWork,
    lines: Sequence[Line],
    results: PartialResults,
    *,
    mapper: Mapper = in_process,
    group_size: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> BatchSummary:
    """Decode the lines that aren't finished yet, and write the output.

    Args:
        work: How.
        lines: From `read_lines`.
        results: Keeps every finished line.
        mapper: Where the work is done.
        group_size: Lines that a worker is given at once, and whose results come back together from a cluster; all
            lines if not given.
        on_progress: Told how many lines are finished, first those of an earlier run.

    Raises:
        InvalidArgumentError: A batch size below 1.
        LayerSkipError: Anything that concerns all lines; those that are finished are kept.
    """
    if work.batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be at least 1, got {work.batch_size}")
    resumed, tokens = len(results.offsets), results.tokens
    on_progress(resumed)
    started = time.perf_counter()
    left = [line for line in lines if line.index not in results.offsets]
    broken = [{**line.fields, "error": line.error} for line in left if line.error is not None]
    results.add(broken)
    on_progress(len(broken))
    # The longest come first: if memory is short, that shows at once, and at the end no worker waits for a long one.
    whole = sorted((line for line in left if line.error is None), key=lambda line: -line.size)
    size = group_size or max(1, len(whole))
    groups = [whole[i : i + size] for i in range(0, len(whole), size)]
    for records in mapper(groups, work.start):
        results.add(records)
        on_progress(len(records))
    seconds = time.perf_counter() - started
    results.finish()
    return BatchSummary(
        lines=len(lines),
        resumed=resumed,
        errors=results.errors,
        tokens=results.tokens,
        seconds=seconds,
        tokens_per_second=(results.tokens - tokens) / seconds if seconds > 0 else 0.0,
    )
