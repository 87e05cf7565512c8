"""The page to try the model at, and metrics."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from layerskip.serving.playground import playground_files


def pages() -> APIRouter:
    """Routes of the playground's files, which are read once."""
    router = APIRouter(include_in_schema=False)
    for path, (content, kind) in playground_files().items():
        router.add_api_route(path, _page(content, kind), methods=["GET"])
    return router


def _page(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


router = APIRouter(tags=["server"])


@router.get("/metrics", summary="Counters for Prometheus")
async def metrics(http: Request) -> Response:
    """Text in Prometheus's format."""
    content, kind = http.app.state.metrics.render()
    return Response(content, media_type=kind)
