"""A generation as it appears, followed event by event."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from layerskip.decoding.adaptive.policy import AdaptivePolicy
from layerskip.decoding.output.events import DraftEvent, GenerationResult, StreamEvent
from layerskip.decoding.output.stream import GenerationStream
from layerskip.decoding.policy import Policy

if TYPE_CHECKING:
    from layerskip.cli.terminal.explanation import Explanation


@dataclass(frozen=True, kw_only=True)
class Run:
    """A generation that has ended, and what it took."""

    result: GenerationResult
    seconds: float
    """Spent in the engine; drawing is left out."""
    policy: Policy | None = None
    """What planned its rounds."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens written for each second in the engine, the reading of the prompt included."""
        return self.result.stats.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped it."""
        return self.result.finish_reason == "interrupted"

    def explain(self) -> "Explanation | None":
        """Why it was decoded as it was, where that was adaptive."""
        from layerskip.cli.terminal.explanation import explain

        return explain(self.policy) if isinstance(self.policy, AdaptivePolicy) else None


def follow(stream: GenerationStream, handle: Callable[[StreamEvent], None]) -> Run:
    """Run a stream of one prompt to its end; Ctrl-C stops it, and what was written until then is the result.

    Args:
        stream: The stream.
        handle: Called with every event.
    """
    seconds = 0.0
    try:
        while True:
            started = perf_counter()
            event = next(stream, None)
            seconds += perf_counter() - started
            if event is None:
                break
            handle(event)
    except KeyboardInterrupt:  # it hit `handle`; within the stream it ends the stream's way
        pass
    return Run(result=stream.results()[0], seconds=seconds, policy=stream.policy)


def ignore(event: StreamEvent) -> None:
    """A handler for `follow` that shows nothing."""


def write_plain(event: StreamEvent) -> None:
    """Write an event's certain text to standard output, at once."""
    if not isinstance(event, DraftEvent) and event.text:
        sys.stdout.write(event.text)
        sys.stdout.flush()
