"""What is told of requests while they run: hooks that do nothing, and for metrics and logs are given a body."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerskip.decoding.engine import Engine
    from layerskip.serving.ticket import Job, JobEnd, RoundPiece, Ticket


class Observer:
    """Is called in the engine's thread; methods must be quick."""

    def load(self, running: int, waiting: int, engine: "Engine") -> None:
        """Texts that run and wait, before a step."""

    def gained(self, job: "Job", pieces: "Sequence[RoundPiece]") -> None:
        """A job has gained tokens, in the rounds of one step."""

    def ended(self, job: "Job", end: "JobEnd") -> None:
        """A job has ended by itself."""

    def cancelled(self, ticket: "Ticket") -> None:
        """The client has gone."""

    def failed(self, ticket: "Ticket", error: Exception) -> None:
        """A ticket can't be finished."""
