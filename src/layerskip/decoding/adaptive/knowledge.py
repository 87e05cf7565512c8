"""What adaptive planning asks to be told of a model on this machine."""

from typing import Protocol

from layerskip.decoding.adaptive.pace import Pace
from layerskip.decoding.adaptive.rates import AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes


class Knowledge(Protocol):
    """What is known about a model on this machine (`experience.Experience`)."""

    def recall(self, num_rows: int) -> None:
        """Look up the costs of batches of this size, unless they are known."""
        ...

    def look(self, num_rows: int, budget: float) -> float:
        """Go on measuring the costs of batches of this size for up to `budget` seconds; returns the seconds spent."""
        ...

    def since(self, started: float) -> float:
        """Seconds since a moment of `time.perf_counter`, the same in all processes that share the network."""
        ...

    def times(self, num_rows: int, *, samples: bool) -> RoundTimes:
        """Predicted seconds of rounds with this many rows."""
        ...

    def pace(self, num_rows: int, *, samples: bool) -> Pace:
        """Counts of rounds and seconds since the alternatives were evaluated, with this many rows."""
        ...

    def rates(self, *, samples: bool) -> AcceptanceRates:
        """Acceptance rates of rows that sample, or of rows that don't."""
        ...
