"""Traces of requests by OpenTelemetry: one span for each, with names of the GenAI conventions, and no text.

Names of attributes follow OpenTelemetry's semantic conventions for generative AI; those of latencies, which the
conventions lack, are vLLM's (`gen_ai.latency.*`). Prompts and answers are never part of a span.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from layerskip.errors import InvalidArgumentError
from layerskip.machine import __version__

Operation = Literal["chat", "text_completion", "generate_content"]
"""What was asked for, in the conventions' words; `/v1/responses` is `generate_content`."""

NANOSECONDS = 1_000_000_000
CLOSE_SECONDS = 5
"""Time that spans have to be sent when the server ends."""
INSTALL = "pip install 'layerskip[otel]'"


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """What is known of a request that has ended."""

    request_id: str
    """Id of the answer, such as `chatcmpl-...`."""
    operation: Operation
    """What was asked for."""
    model: str
    """Served name of the model."""
    start: float
    """When the request arrived, in seconds since 1970 (`time.time()`)."""
    seconds: float
    """From its arrival to its end."""
    prompt_tokens: int
    """Tokens of all its prompts."""
    generation_tokens: int
    """Tokens of all its choices."""
    cached_tokens: int = 0
    """Tokens of its prompts that were found in the prefix cache."""
    queue_seconds: float | None = None
    """From its arrival to its place in the batch; None if it never got one."""
    first_token_seconds: float | None = None
    """From its arrival to its first token; None if there was none."""
    finish_reasons: tuple[str, ...] = ()
    """Why each choice ended."""
    num_drafts: int = 0
    """Rounds with drafts."""
    num_draft_tokens: int = 0
    """Tokens drafted in them."""
    num_accepted_tokens: int = 0
    """Drafted tokens accepted."""
    settings: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Settings of the request by their names in its body, those of `SETTINGS`; others are left out."""
    error: str | None = None
    """Type of the error with which it ended, such as `timeout`; no text of the request. None if there was none."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the request, lower-case; `traceparent` and `tracestate` are read to find the caller's trace."""


SETTINGS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "stream": "gen_ai.request.stream",
    "exit_layer": "layerskip.request.exit_layer",
    "num_speculations": "layerskip.request.num_speculations",
}
"""Names of a body's fields, and of the attributes that they become."""


class Tracer:
    """Makes spans of requests that have ended, and sends them from a thread of its own."""

    def __init__(self, processor: Any) -> None:
        """Start tracing; `make_tracer` does it for an address.

        Args:
            processor: A span processor of the OpenTelemetry SDK, which passes spans on. `OTEL_TRACES_SAMPLER` says
                which requests are traced: by default all but those whose caller doesn't want it.
        """
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({SERVICE_NAME: "layerskip", SERVICE_VERSION: __version__})
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("layerskip", __version__)

    def record(self, trace: RequestTrace) -> None:
        """Make the span of a request that has ended, below its caller's span if its headers name one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # A context of its own: what this thread happens to be doing is nobody's parent.
        context = TraceContextTextMapPropagator().extract(dict(trace.headers), context=_empty_context())
        start = int(trace.start * NANOSECONDS)
        span = self._tracer.start_span(
            f"{trace.operation} {trace.model}",
            context=context,
            kind=SpanKind.SERVER,
            attributes=attributes_of(trace),
            start_time=start,
        )
        if trace.first_token_seconds is not None:
            span.add_event("first_token", timestamp=start + int(trace.first_token_seconds * NANOSECONDS))
        if trace.error is not None:
            span.set_status(Status(StatusCode.ERROR, trace.error))
        span.end(end_time=start + int(trace.seconds * NANOSECONDS))

    def close(self) -> None:
        """Send what is left, for a few seconds at most, and stop."""
        self._provider.force_flush(CLOSE_SECONDS * 1000)
        self._provider.shutdown()


def make_tracer(endpoint: str | None) -> Tracer | None:
    """A tracer that sends spans by OTLP over HTTP.

    Args:
        endpoint: Where to, such as `http://collector:4318`; `/v1/traces` is appended where the address has no path.
            None: nothing is traced.

    Returns:
        The tracer, to be closed at the end, or None.

    Raises:
        InvalidArgumentError: OpenTelemetry or its exporter isn't installed, or the address isn't one.
    """
    if endpoint is None:
        return None
    url = traces_url(endpoint)
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidArgumentError(f"traces need opentelemetry-sdk, which is not installed here: {INSTALL}") from error
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidArgumentError(
            f"traces are sent by opentelemetry-exporter-otlp-proto-http, which is not installed here: {INSTALL}"
        ) from error
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))


def traces_url(endpoint: str) -> str:
    """The address that spans are posted to.

    Raises:
        InvalidArgumentError: It isn't an address of http or https.
    """
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InvalidArgumentError(
            f"the endpoint for traces must be an address like http://collector:4318 (OTLP over HTTP), got {endpoint!r}"
        )
    return endpoint.rstrip("/") + "/v1/traces" if parts.path in ("", "/") and not parts.query else endpoint


def attributes_of(trace: RequestTrace) -> dict[str, Any]:
    """The attributes of a request's span."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": trace.operation,
        "gen_ai.provider.name": "layerskip",
        "gen_ai.request.model": trace.model,
        "gen_ai.response.model": trace.model,
        "gen_ai.response.id": trace.request_id,
        "gen_ai.request.id": trace.request_id,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.generation_tokens,
        "gen_ai.usage.cache_read.input_tokens": trace.cached_tokens,
        "gen_ai.response.finish_reasons": list(trace.finish_reasons),
        "gen_ai.latency.e2e": trace.seconds,
        "layerskip.spec_decode.num_drafts": trace.num_drafts,
        "layerskip.spec_decode.num_draft_tokens": trace.num_draft_tokens,
        "layerskip.spec_decode.num_accepted_tokens": trace.num_accepted_tokens,
    }
    optional = {
        "gen_ai.latency.time_in_queue": trace.queue_seconds,
        "gen_ai.latency.time_to_first_token": trace.first_token_seconds,
        "error.type": trace.error,
        **{attribute: trace.settings.get(name) for name, attribute in SETTINGS.items()},
    }
    return attributes | {name: value for name, value in optional.items() if value is not None}


def _empty_context() -> Any:
    from opentelemetry.context import Context

    return Context()
