"""Where a measurement keeps its finished samples."""

from collections.abc import Mapping
from typing import Any


class SampleStore:
    """Samples by key, in memory; `RunFolder` has them on disk as well."""

    place = "memory"
    """Where the samples are, for messages."""

    def __init__(self) -> None:
        """No samples yet."""
        self.samples: dict[str, dict[str, Any]] = {}

    def add(self, key: str, sample: Mapping[str, Any]) -> None:
        """Keep a finished sample."""
        self.samples[key] = {"key": key, **sample}
