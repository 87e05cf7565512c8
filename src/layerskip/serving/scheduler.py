"""One thread owns the engine: it lets requests join between rounds, runs the rounds, and hands out what they give.

Whatever touches the engine happens in this thread. Other threads leave requests and cancellations in a mailbox, and get
what their tickets gain through their event loops: one call a step, whatever the number of rows.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from layerskip.decoding.engine import Engine
from layerskip.decoding.event import Event
from layerskip.decoding.output.writer import RowWriter
from layerskip.decoding.row import Row
from layerskip.errors import LayerSkipError
from layerskip.serving.observer import Observer
from layerskip.serving.protocol.errors import ApiError, api_error, busy
from layerskip.serving.ticket import Delivery, Job, JobEnd, JobFailure, RoundPiece, Ticket
from layerskip.text.tokenizer import Tokenizer

CHECK_SECONDS = 0.25
"""Seconds between looks at tickets whose time may be over."""

log = logging.getLogger("layerskip.serving")


class Scheduler:
    """Requests in, deliveries out."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        tokenizer: Tokenizer,
        *,
        max_queue: int,
        observer: Observer | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            make_engine: Makes the engine, also a new one where a failure has left the old one in doubt.
            tokenizer: Makes text.
            max_queue: Tickets that may wait; those that can join at once don't count.
            observer: Is told what happens.
        """
        self._make_engine, self._tokenizer, self._max_queue = make_engine, tokenizer, max_queue
        self._observer = observer or Observer()
        self._engine = make_engine()
        self._lock = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._cancelled: set[Ticket] = set()
        self._waiting: deque[Job] = deque()
        self._writers: dict[Row, tuple[Job, RowWriter]] = {}
        self._tickets: set[Ticket] = set()
        """Tickets that haven't ended."""
        self._checked_at = 0.0
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="layerskip-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """The engine, for its sizes."""
        return self._engine

    @property
    def num_running(self) -> int:
        """Texts that are generated at present."""
        return len(self._writers)

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting) + sum(len(ticket.jobs) for ticket in list(self._arrived))

    @property
    def num_tickets(self) -> int:
        """Requests that haven't ended."""
        return len(self._tickets)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Leave a request.

        Raises:
            ApiError: The server is stopping, or too many requests wait; the client may try again.
        """
        with self._lock:
            if self._draining:
                raise busy("the server is shutting down; ask another one, or try again later", "shutting_down")
            if not self._thread.is_alive():
                raise busy("the server's engine has stopped; its log says why", "engine_stopped")
            waiting = len(self._arrived) + len({job.ticket for job in self._waiting})
            free = self._engine.free_rows - len(self._waiting) - sum(len(other.jobs) for other in self._arrived)
            if waiting >= self._max_queue and free < len(ticket.jobs):
                raise busy(f"{waiting} requests wait already, and no more may; try again in a moment", "queue_full")
            self._tickets.add(ticket)
            self._arrived.append(ticket)
            self._lock.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up, wherever it is; without effect if it has ended."""
        with self._lock:
            if ticket in self._tickets:
                self._cancelled.add(ticket)
                self._lock.notify()

    def drain(self) -> None:
        """Take no further requests; those that were taken go on."""
        with self._lock:
            self._draining = True

    def stop(self, timeout: float = 10.0) -> None:
        """End what runs, and the thread."""
        with self._lock:
            self._draining = self._stopping = True
            self._lock.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            try:
                if not self._take_mail():
                    break
                self._admit()
                if self._writers:
                    started = time.perf_counter()
                    self._hand_out(self._engine.step(), started)
            except Exception as error:  # a fault of the network or of ours must not end the others' service
                self._recover(error)
        self._fail(list(self._tickets), busy("the server has stopped before this request ended", "shutting_down"))

    def _take_mail(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._lock:
            while not (self._arrived or self._cancelled or self._waiting or self._writers or self._stopping):
                self._observer.load(0, 0, self._engine)
                self._lock.wait()
            if self._stopping:
                return False
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled & self._tickets, set()  # others have ended meanwhile
            self._waiting.extend(job for ticket in arrived for job in ticket.jobs)
        for ticket in cancelled:
            self._observer.cancelled(ticket)
        self._drop(cancelled)
        self._give_up_late()
        return True

    def _admit(self) -> None:
        """Let jobs join in the order of their arrival."""
        while self._waiting and self._engine.free_rows:
            with self._lock:  # others count what waits
                job = self._waiting.popleft()
            try:
                row = self._engine.add(job.request)
            except LayerSkipError as error:  # of this request only
                self._fail_job(job, error)
                continue
            job.joined_at = time.monotonic()
            writer = RowWriter(self._engine, row, self._tokenizer, job.place, shown=job.ticket.shown)
            self._writers[row] = job, writer
        self._observer.load(len(self._writers), len(self._waiting), self._engine)

    def _hand_out(self, events: Iterable[Event], started: float) -> None:
        """Turn a step's events into deliveries, and hand them to the loops that wait for them."""
        by_row: dict[Row, list[Event]] = {}
        for event in events:
            by_row.setdefault(event.row, []).append(event)
        rounds = max(map(len, by_row.values()), default=1)
        seconds = (time.perf_counter() - started) / rounds
        mail: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Delivery]]] = {}
        for row, own in by_row.items():
            known = self._writers.get(row)
            if known is None:
                continue
            job, writer = known
            for delivery in self._deliveries(job, writer, own, seconds):
                mail.setdefault(job.ticket.loop, []).append((job.ticket, delivery))
        for loop, box in mail.items():
            _post(loop, box)

    def _deliveries(self, job: Job, writer: RowWriter, events: Sequence[Event], seconds: float) -> list[Delivery]:
        """What a job gets of a step: its rounds one by one for clients that want to see drafts, else in one piece."""
        begins = job.first_token_at is None
        pieces = [
            _piece(job, writer, event, seconds, is_first=begins and place == 0) for place, event in enumerate(events)
        ]
        self._observer.gained(job, pieces)
        job.last_token_at = time.monotonic()
        job.first_token_at = job.first_token_at or job.last_token_at
        shown: list[Delivery] = []
        if job.ticket.in_pieces:
            shown += pieces if job.ticket.show_drafts else [RoundPiece.together(pieces)]
        if not events[-1].ends:
            return shown
        del self._writers[writer.row]
        end = JobEnd(place=job.place, text=writer.finish().text, result=writer.result())
        job.ticket.ends.append(end)
        self._end(job)
        self._observer.ended(job, end)
        return [*shown, _unless_stuck(end)]

    def _drop(self, tickets: Iterable[Ticket]) -> None:
        """Take the jobs of some tickets out of the queue and of the engine."""
        dropped = set(tickets)
        if not dropped:
            return
        with self._lock:
            self._waiting = deque(job for job in self._waiting if job.ticket not in dropped)
        for row, (job, _) in list(self._writers.items()):
            if job.ticket in dropped:
                del self._writers[row]
                self._engine.finish(row, "interrupted")
        for ticket in dropped:
            for job in ticket.jobs:
                job.ended = True
            self._tickets.discard(ticket)

    def _give_up_late(self) -> None:
        now = time.monotonic()
        if now < self._checked_at + CHECK_SECONDS:
            return
        self._checked_at = now
        with self._lock:  # others add tickets
            late = [ticket for ticket in self._tickets if ticket.is_late]
        if late:
            timeout = late[0].timeout
            self._fail(late, ApiError(504, f"the request took longer than {timeout:g} s", code="timeout"))

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in list(tickets):
            open_jobs = [job for job in ticket.jobs if not job.ended]
            self._observer.failed(ticket, error)
            self._drop([ticket])
            _post(ticket.loop, [(ticket, JobFailure(place=job.place, error=error)) for job in open_jobs])

    def _fail_job(self, job: Job, error: Exception) -> None:
        self._end(job)
        self._observer.failed(job.ticket, error)
        _post(job.ticket.loop, [(job.ticket, JobFailure(place=job.place, error=error))])

    def _end(self, job: Job) -> None:
        job.ended = True
        if job.ticket.ended:
            self._tickets.discard(job.ticket)

    def _recover(self, error: Exception) -> None:
        """Fail what runs, and begin with a new engine; what waits is served by that."""
        log.exception("a step of the engine failed", exc_info=error)
        running = {job.ticket for job, _ in self._writers.values()}
        self._writers.clear()  # their rows are in an engine that nobody uses any more
        self._fail(running, api_error(error))
        while not self._stopping:
            try:
                self._engine = self._make_engine()
                return
            except LayerSkipError as again:  # no memory at present
                log.error("no new engine: %s", again)
                self._fail(list(self._tickets), api_error(again))
                time.sleep(CHECK_SECONDS)


def _piece(job: Job, writer: RowWriter, event: Event, seconds: float, *, is_first: bool) -> RoundPiece:
    """A round of a job."""
    draft_texts = writer.spell(event.drafts) if job.ticket.show_drafts and event.drafts else ()
    tokens = tuple(writer.write(event))
    return RoundPiece(
        place=job.place,
        text="".join(token.text for token in tokens),
        tokens=tokens,
        drafts=event.drafts,
        draft_texts=draft_texts,
        num_accepted=event.num_accepted,
        drafter=event.drafter,
        exit_layer=event.exit_layer,
        seconds=seconds,
        prompt_logprobs=tuple(event.row.prompt_logprobs) if is_first else (),
    )


def _unless_stuck(end: JobEnd) -> JobEnd | JobFailure:
    """The end of a job, as a failure if its text couldn't be held to the form that was asked for."""
    if end.result.finish_reason != "error":
        return end
    message = f"the answer can't be held to the form that was asked for: {end.result.stop_reason}"
    return JobFailure(place=end.place, error=ApiError(400, message, code="constraint_failed"))


def _post(loop: asyncio.AbstractEventLoop, box: list[tuple[Ticket, Delivery]]) -> None:
    """Hand deliveries to the tickets of a loop, in that loop's own thread."""

    def put() -> None:
        for ticket, delivery in box:
            ticket.put(delivery)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop has been closed: nobody waits any more
        log.debug("a closed event loop missed %d deliveries", len(box))
