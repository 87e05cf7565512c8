"""What a sweep leaves: a table in the columns of Meta's script, and the best setting beside the checkpoint."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from layerskip.files import write_atomically

CSV_FILE = "sweep.csv"


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One setting; times are None where it wasn't run."""

    exit_layer: int
    num_speculations: int
    acceptance_rate: float
    """Accepted drafts, of all."""
    total_time: float | None = None
    """Seconds for all prompts, reading them included."""
    time_per_token: float | None = None
    """Seconds."""
    tokens_per_second: float | None = None
    predicted_tokens_per_second: float | None = None

    @property
    def setting(self) -> tuple[int, int]:
        """Exit layer and draft length."""
        return self.exit_layer, self.num_speculations

    def with_measured(self, total: Mapping[str, float]) -> "SweepRow":
        """The row with what all prompts took: sums of `tokens`, `seconds`, `drafted` and `accepted`."""
        return replace(
            self,
            acceptance_rate=total["accepted"] / max(1.0, total["drafted"]),
            total_time=total["seconds"],
            time_per_token=total["seconds"] / total["tokens"],
            tokens_per_second=total["tokens"] / total["seconds"],
        )


def write_csv(folder: Path, rows: Sequence[SweepRow]) -> Path:
    """Write `sweep.csv` as a whole; cells of settings that weren't run are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()})
    write_atomically(folder / CSV_FILE, text.getvalue())
    return folder / CSV_FILE
