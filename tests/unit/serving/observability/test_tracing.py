"""A request that has ended becomes one span."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from layerskip.errors import InvalidArgumentError
from layerskip.serving.observability.tracing import RequestTrace, Tracer, make_tracer, traces_url

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exported: InMemorySpanExporter) -> Iterator[Tracer]:
    tracer = Tracer(SimpleSpanProcessor(exported))
    yield tracer
    tracer.close()


def trace_of(**options: Any) -> RequestTrace:
    required = {
        "request_id": "chatcmpl-1",
        "operation": "chat",
        "model": "smollm2",
        "start": 1_700_000_000.5,
        "seconds": 0.75,
        "prompt_tokens": 12,
        "generation_tokens": 30,
    }
    return RequestTrace(**(required | options))


def test_a_finished_request(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    tracer.record(
        trace_of(
            cached_tokens=8,
            queue_seconds=0.125,
            first_token_seconds=0.25,
            finish_reasons=("stop", "length"),
            num_drafts=6,
            num_draft_tokens=24,
            num_accepted_tokens=20,
            settings={"temperature": 0.0, "max_tokens": 64, "exit_layer": 4, "prompt": 7, "n": 2, "stream": True},
        )
    )
    (span,) = exported.get_finished_spans()
    assert span.name == "chat smollm2"
    assert span.kind == SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code == StatusCode.UNSET
    assert (span.start_time, span.end_time) == (1_700_000_000_500_000_000, 1_700_000_001_250_000_000)
    (event,) = span.events
    assert (event.name, event.timestamp) == ("first_token", 1_700_000_000_750_000_000)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "layerskip",
        "gen_ai.request.model": "smollm2",
        "gen_ai.response.model": "smollm2",
        "gen_ai.request.id": "chatcmpl-1",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 30,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": True,
        "gen_ai.latency.e2e": 0.75,
        "gen_ai.latency.time_in_queue": 0.125,
        "gen_ai.latency.time_to_first_token": 0.25,
        "layerskip.request.exit_layer": 4,
        "layerskip.spec_decode.num_drafts": 6,
        "layerskip.spec_decode.num_draft_tokens": 24,
        "layerskip.spec_decode.num_accepted_tokens": 20,
    }
    assert span.resource.attributes["service.name"] == "layerskip"


def test_a_request_that_failed_before_its_first_token(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    tracer.record(trace_of(generation_tokens=0, error="timeout"))
    (span,) = exported.get_finished_spans()
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes["error.type"] == "timeout"
    assert span.events == ()
    assert "gen_ai.latency.time_to_first_token" not in span.attributes
    assert "gen_ai.latency.time_in_queue" not in span.attributes


def test_the_span_belongs_to_the_callers_trace(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=1"}
    tracer.record(trace_of(headers=headers))
    (span,) = exported.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == SPAN_ID
    assert span.context.trace_state["vendor"] == "1"


def test_a_caller_that_does_not_sample_is_left_alone(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    tracer.record(trace_of(headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}))
    assert exported.get_finished_spans() == ()


@pytest.mark.parametrize("traceparent", ["", "00", f"00-{'0' * 32}-{SPAN_ID}-01", "x" * 5000, f"00-{TRACE_ID}-é-01"])
def test_a_damaged_header_starts_a_new_trace(tracer: Tracer, exported: InMemorySpanExporter, traceparent: str) -> None:
    tracer.record(trace_of(headers={"traceparent": traceparent}))
    (span,) = exported.get_finished_spans()
    assert span.parent is None


def test_an_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch, exported: InMemorySpanExporter) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chatbot")
    tracer = Tracer(SimpleSpanProcessor(exported))
    tracer.record(trace_of())
    tracer.close()
    assert exported.get_finished_spans()[0].resource.attributes["service.name"] == "chatbot"


def test_nothing_is_traced_without_an_address() -> None:
    assert make_tracer(None) is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("https://[::1]:4318/", "https://[::1]:4318/v1/traces"),
        ("http://collector/otlp/v1/traces", "http://collector/otlp/v1/traces"),
    ],
)
def test_addresses(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint", ["", "collector:4317", "grpc://collector:4317", "http://", "http://x:99999", "http://["]
)
def test_what_is_no_address_is_an_error(endpoint: str) -> None:
    with pytest.raises(InvalidArgumentError, match="must be an address like http://collector:4318"):
        make_tracer(endpoint)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("opentelemetry.sdk.trace.export", "opentelemetry-sdk"),
        ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry-exporter-otlp-proto-http"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, named: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidArgumentError, match=named + r".*pip install 'layerskip\[otel\]'"):
        make_tracer("http://127.0.0.1:4318")


def test_spans_arrive_by_http() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    posted: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tracer = make_tracer(f"http://127.0.0.1:{server.server_port}")
            assert tracer is not None
            tracer.record(trace_of())
            tracer.close()
        finally:
            server.shutdown()
            thread.join()
    ((path, body),) = posted
    assert path == "/v1/traces"
    request = ExportTraceServiceRequest.FromString(body)
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "chat smollm2"
