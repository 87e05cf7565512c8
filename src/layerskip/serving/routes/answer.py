"""Waiting for a ticket while its client may go away, and streams of events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.scheduler import Scheduler
from layerskip.serving.ticket import Delivery, JobEnd, JobFailure, Ticket

Result = TypeVar("Result")
CLIENT_GONE = 499
"""Status of a request whose client has gone; nobody reads it."""


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Wait for something, but no longer than the client does.

    Raises:
        ApiError: The client has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_GONE, "the client has closed the connection")
    finally:
        for each in (task, gone):
            each.cancel()


async def all_ends(http: HttpRequest, scheduler: Scheduler, ticket: Ticket) -> list[JobEnd]:
    """The ends of a ticket's jobs, in their order, with all their text.

    Raises:
        ApiError: A job has failed, or the client has gone.
    """
    try:
        return await unless_gone(http.receive, _collect(ticket))
    finally:
        scheduler.cancel(ticket)


async def _collect(ticket: Ticket) -> list[JobEnd]:
    ends: dict[int, JobEnd] = {}
    async for delivery in ticket.deliveries():
        if isinstance(delivery, JobFailure):
            raise api_error(delivery.error)
        if isinstance(delivery, JobEnd):
            ends[delivery.place] = delivery
    return [ends[place] for place in sorted(ends)]


async def begin(http: HttpRequest, scheduler: Scheduler, ticket: Ticket) -> AsyncIterator[Delivery]:
    """A ticket's deliveries, once the first one is there: until then a failure still has a status of its own.

    Raises:
        ApiError: The first thing that happened was a failure, or the client has gone.
    """
    deliveries = ticket.deliveries()
    try:
        first = await unless_gone(http.receive, anext(deliveries))
    except BaseException:
        scheduler.cancel(ticket)
        raise
    if isinstance(first, JobFailure):
        scheduler.cancel(ticket)
        raise api_error(first.error)

    async def rest() -> AsyncIterator[Delivery]:
        yield first
        async for delivery in deliveries:
            yield delivery

    return rest()


class EventStream(Response):
    """Server-sent events; whatever makes them is told when the client has gone or all is sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        """Take the events.

        Args:
            events: Whole events.
            at_end: Called once, however the stream ends.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._at_end = events, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._at_end()
            for each in (sending, gone):
                each.cancel()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
