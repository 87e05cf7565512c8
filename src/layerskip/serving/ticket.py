"""A client's request on its way through the scheduler: one ticket, one job for each text that it asks for."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerskip.decoding.output.events import GenerationResult, TokenEvent
from layerskip.decoding.policy import DrafterName
from layerskip.decoding.request import Request
from layerskip.decoding.rules.logprobs import TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The client's request that a ticket is for, as logs and traces have it."""

    request_id: str
    """Id of the answer."""
    operation: Literal["chat", "text_completion", "generate_content"]
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that name a trace."""
    settings: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Numbers in its body."""


@dataclass(frozen=True, kw_only=True)
class RoundPiece:
    """What a job gained in one round, or in those of one step."""

    place: int
    """The job's place in its ticket."""
    text: str
    """Text that is certain now; empty while a character is incomplete or a stop string possible."""
    tokens: tuple[TokenEvent, ...]
    drafts: tuple[int, ...] = ()
    """Drafts that were verified."""
    draft_texts: tuple[str, ...] = ()
    """The text of each, if the ticket asks for drafts."""
    num_accepted: int = 0
    drafter: DrafterName | None = None
    exit_layer: int = 0
    """The exit that drafted; 0 where no layers did."""
    seconds: float = 0.0
    """Of the step in which the round was run."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Of the prompt's tokens, in a job's first piece, if they are asked for."""

    @classmethod
    def together(cls, pieces: "Sequence[RoundPiece]") -> "RoundPiece":
        """What a job has gained in several rounds, one after the other, without their drafts."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            place=pieces[0].place,
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            seconds=sum(piece.seconds for piece in pieces),
            prompt_logprobs=pieces[0].prompt_logprobs,
        )


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """A job has ended."""

    place: int
    text: str
    """Text that was held back and is certain now."""
    result: GenerationResult


@dataclass(frozen=True, kw_only=True)
class JobFailure:
    """A job can't be finished."""

    place: int
    error: Exception


Delivery = RoundPiece | JobEnd | JobFailure


@dataclass(eq=False, kw_only=True)
class Job:
    """One text to generate."""

    ticket: "Ticket"
    place: int
    request: Request
    joined_at: float | None = None
    """When the engine took it, by `time.monotonic`."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended: bool = False


@dataclass(eq=False, kw_only=True)
class Ticket:
    """The texts that one client's request asks for, and what becomes of them."""

    in_pieces: bool = True
    """Whether each round's piece is delivered; else there are ends only, and nobody is woken in between."""
    show_drafts: bool = False
    """Whether the client wants to see drafts."""
    shown: Mapping[int, str] = field(default_factory=dict)
    """Special tokens that are part of the text, and their texts."""
    timeout: float
    """Seconds after which the request is given up."""
    origin: Origin
    created: float = field(default_factory=time.monotonic)
    jobs: list[Job] = field(default_factory=list)
    ends: list[JobEnd] = field(default_factory=list)
    """Ends of the jobs that have ended by themselves."""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _inbox: "asyncio.Queue[Delivery]" = field(default_factory=asyncio.Queue)

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        origin: Origin,
        *,
        timeout: float,
        in_pieces: bool = True,
        show_drafts: bool = False,
        shown: Mapping[int, str] | None = None,
    ) -> "Ticket":
        """A ticket for some requests; call it in the event loop that will wait for it."""
        ticket = cls(origin=origin, timeout=timeout, in_pieces=in_pieces, show_drafts=show_drafts, shown=shown or {})
        ticket.jobs = [Job(ticket=ticket, place=place, request=request) for place, request in enumerate(requests)]
        return ticket

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that waits for this ticket."""
        return self._loop

    @property
    def ended(self) -> bool:
        """Whether all its jobs have ended."""
        return all(job.ended for job in self.jobs)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.created + self.timeout

    def put(self, delivery: Delivery) -> None:
        """Hand something over; in the ticket's event loop."""
        self._inbox.put_nowait(delivery)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """What comes, until all jobs have ended or failed."""
        open_places = {job.place for job in self.jobs}
        while open_places:
            delivery = await self._inbox.get()
            if not isinstance(delivery, RoundPiece):
                open_places.discard(delivery.place)
            yield delivery
