"""The table that a sweep leaves, in the columns of Meta's script."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from layerskip.evaluation.sweep.prediction import SweepRow
from layerskip.files import write_atomically

CSV_FILE = "sweep.csv"


def write_csv(folder: Path, rows: Sequence[SweepRow]) -> Path:
    """Write `sweep.csv` as a whole; cells of settings that weren't run are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()})
    write_atomically(folder / CSV_FILE, text.getvalue())
    return folder / CSV_FILE
