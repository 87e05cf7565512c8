"""Routes of the playground's files."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from fastapi.responses import Response

from layerskip.serving.playground import playground_files

HEADERS = {"Cache-Control": "no-cache"}
"""Browsers ask again, so that a page never runs the scripts of another version."""


def make_router() -> APIRouter:
    """A route for each file: `/`, `/playground.css`, `/playground.js`, ..."""
    router = APIRouter(include_in_schema=False)
    for path, (content, kind) in playground_files().items():
        router.add_api_route(path, _sender(content, kind), methods=["GET", "HEAD"], name=f"playground {path}")
    return router


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    """A function without parameters that answers with a file."""

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
