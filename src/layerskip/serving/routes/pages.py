"""Metrics, and a page that describes the routes."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from layerskip.serving.routes.reference import reference_page

router = APIRouter(tags=["server"])


@router.get("/metrics", summary="Counters for Prometheus")
async def metrics(http: Request) -> Response:
    """Text in Prometheus's format."""
    content, kind = http.app.state.metrics.render()
    return Response(content, media_type=kind)


@router.get("/docs", include_in_schema=False)
async def reference(http: Request) -> HTMLResponse:
    """What `/openapi.json` says, for people; nothing is fetched from elsewhere."""
    return HTMLResponse(reference_page(http.app.openapi()))
