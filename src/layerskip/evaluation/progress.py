"""How far a measurement is."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Told what is under way, how many units of work are done, and how many there are in all (None if not known)."""


def ignore_progress(what: str, done: int, total: int | None) -> None:
    """The `Progress` of callers that don't want to know."""


class Meter:
    """Counts units of work, and tells a `Progress` of each step."""

    def __init__(self, on_progress: Progress, total: int | None) -> None:
        """Nothing is done yet.

        Args:
            on_progress: Told whenever something is done.
            total: Units of work in all; None if not known.
        """
        self._on_progress, self._total, self._done = on_progress, total, 0

    def advance(self, what: str, units: int = 1) -> None:
        """Some more units of work are done.

        Args:
            what: What is under way.
            units: How many were done since the last call.
        """
        self._done += units
        self._on_progress(what, self._done, self._total)
