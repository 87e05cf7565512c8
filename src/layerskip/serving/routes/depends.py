"""What routes are given."""

from typing import Annotated, Literal, cast

from fastapi import Depends, Request

from layerskip.serving.observability.tracing import SETTINGS
from layerskip.serving.protocol.requests import GenerationBody
from layerskip.serving.service import Service
from layerskip.serving.ticket import Origin


def service_of(http: Request) -> Service:
    """The service of the app that a request came to."""
    return cast("Service", http.app.state.service)


ServiceOf = Annotated[Service, Depends(service_of)]
TRACE_HEADERS = ("traceparent", "tracestate")


def origin_of(
    http: Request,
    body: GenerationBody,
    request_id: str,
    operation: Literal["chat", "text_completion", "generate_content"],
) -> Origin:
    """What logs and traces say of a request: numbers, no texts."""
    settings = body.model_dump(include=set(SETTINGS), exclude_none=True)
    headers = {name: http.headers[name] for name in TRACE_HEADERS if name in http.headers}
    return Origin(request_id=request_id, operation=operation, headers=headers, settings=settings)
