"""What happens to requests, as metrics, traces and lines of a log; called by the engine's thread."""

import json
import logging
import time
from collections.abc import Sequence

from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixCounts
from layerskip.serving.observability.metrics import ServerMetrics
from layerskip.serving.observability.tracing import RequestTrace, Tracer
from layerskip.serving.observer import Observer
from layerskip.serving.protocol.errors import api_error
from layerskip.serving.ticket import Job, JobEnd, RoundPiece, Ticket
from layerskip.text.tokenizer import Tokenizer

log = logging.getLogger("layerskip.serving.requests")


class Recorder(Observer):
    """Tells metrics, traces and the log."""

    def __init__(
        self, metrics: ServerMetrics, tracer: Tracer | None, *, tokenizer: Tokenizer, log_prompts: bool = False
    ) -> None:
        """Take who is told.

        Args:
            metrics: Counts.
            tracer: Sends traces; None: there are none.
            tokenizer: Makes text of prompts that are logged.
            log_prompts: Write prompts and answers into the log.
        """
        self._metrics, self._tracer = metrics, tracer
        self._tokenizer, self._log_prompts = tokenizer, log_prompts
        self._prefix = PrefixCounts()

    def load(self, running: int, waiting: int, engine: Engine) -> None:
        """As `Observer.load`."""
        self._metrics.set_load(running, waiting, engine.cache_usage)
        counts, known = engine.prefix_counts, self._prefix
        if counts.queries != known.queries:
            self._metrics.observe_prefix(counts.queries - known.queries, counts.hits - known.hits)
            self._prefix = counts

    def gained(self, job: Job, pieces: Sequence[RoundPiece]) -> None:
        """As `Observer.gained`."""
        now = time.monotonic()
        for piece in pieces:
            self._metrics.observe_round(piece.drafter, len(piece.drafts), piece.num_accepted)
        since = None if job.last_token_at is None else now - job.last_token_at
        self._metrics.observe_tokens(sum(len(piece.tokens) for piece in pieces), since)
        if job.first_token_at is None:
            self._metrics.observe_first_token(now - job.ticket.created)

    def ended(self, job: Job, end: JobEnd) -> None:
        """As `Observer.ended`."""
        self._finish(job, end.result.finish_reason, len(end.result.token_ids))
        if job.ticket.ended:
            self._report(job.ticket)

    def cancelled(self, ticket: Ticket) -> None:
        """As `Observer.cancelled`."""
        self._give_up(ticket, "abort")

    def failed(self, ticket: Ticket, error: Exception) -> None:
        """As `Observer.failed`."""
        self._give_up(ticket, "error", api_error(error).code or "error")

    def _give_up(self, ticket: Ticket, reason: str, code: str | None = None) -> None:
        for job in ticket.jobs:
            if not job.ended:
                self._finish(job, reason, 0)
        self._report(ticket, code or reason)

    def _finish(self, job: Job, reason: str, num_tokens: int) -> None:
        now, created = time.monotonic(), job.ticket.created
        queued = (now if job.joined_at is None else job.joined_at) - created
        self._metrics.observe_finished(reason, len(job.request.tokens), num_tokens, now - created, queued)

    def _report(self, ticket: Ticket, error: str | None = None) -> None:
        """Write the line of a request that has ended, and its trace."""
        trace = self._trace(ticket, error)
        record = {
            "request": trace.request_id,
            "operation": trace.operation,
            "reasons": list(trace.finish_reasons),
            "error": error,
            "prompt_tokens": trace.prompt_tokens,
            "cached_tokens": trace.cached_tokens,
            "tokens": trace.generation_tokens,
            "seconds": round(trace.seconds, 4),
            "queue_seconds": _rounded(trace.queue_seconds),
            "first_token_seconds": _rounded(trace.first_token_seconds),
            "drafted": trace.num_draft_tokens,
            "accepted": trace.num_accepted_tokens,
        }
        if self._log_prompts:
            prompts = dict.fromkeys(job.request.tokens for job in ticket.jobs)
            record["prompts"] = [
                str(self._tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)) for prompt in prompts
            ]
            record["texts"] = [end.result.text for end in ticket.ends]
        log.info(json.dumps(record))
        if self._tracer is not None:
            self._tracer.record(trace)

    def _trace(self, ticket: Ticket, error: str | None) -> RequestTrace:
        seconds, origin = time.monotonic() - ticket.created, ticket.origin
        stats = [end.result.stats for end in ticket.ends]
        joined = [job.joined_at - ticket.created for job in ticket.jobs if job.joined_at is not None]
        first = [job.first_token_at - ticket.created for job in ticket.jobs if job.first_token_at is not None]
        return RequestTrace(
            request_id=origin.request_id,
            operation=origin.operation,
            model=self._metrics.model,
            start=time.time() - seconds,
            seconds=seconds,
            prompt_tokens=sum(map(len, dict.fromkeys(job.request.tokens for job in ticket.jobs))),
            generation_tokens=sum(len(end.result.token_ids) for end in ticket.ends),
            cached_tokens=sum(s.cached_tokens for s in stats),
            queue_seconds=min(joined, default=None),
            first_token_seconds=min(first, default=None),
            finish_reasons=tuple(end.result.finish_reason for end in ticket.ends),
            num_drafts=sum(s.drafted_by_position[0] for s in stats if s.drafted_by_position),
            num_draft_tokens=sum(s.drafted for s in stats),
            num_accepted_tokens=sum(s.accepted for s in stats),
            settings=origin.settings,
            error=error,
            headers=origin.headers,
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
