"""What is served, and whether it is."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from layerskip.machine import __version__
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.routes.depends import ServiceOf
from layerskip.serving.service import Service

router = APIRouter()


@router.get("/health", summary="200 while requests are taken, 503 otherwise", tags=["server"])
async def health(service: ServiceOf) -> Response:
    """For probes; needs no key."""
    ready = service.scheduler.is_ready
    return JSONResponse({"status": "ok" if ready else "shutting down"}, 200 if ready else 503)


@router.get("/version", summary="Version of the server", tags=["server"])
async def version() -> dict[str, str]:
    """The package's version."""
    return {"version": __version__}


@router.get("/v1/models", summary="The models that are served: one", tags=["OpenAI"])
async def models(service: ServiceOf) -> dict[str, Any]:
    """A list of one."""
    return {"object": "list", "data": [describe(service)]}


@router.get("/v1/models/{name:path}", summary="One of these models", tags=["OpenAI"])
async def model(name: str, service: ServiceOf) -> dict[str, Any]:
    """One model, by its name."""
    if name != service.name:
        raise ApiError(404, f"the model {name!r} is not served here; use {service.name!r}", code="model_not_found")
    return describe(service)


def describe(service: Service) -> dict[str, Any]:
    """A model as OpenAI lists it, with what our clients want to know."""
    decoder = service.lm.decoder
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "layerskip",
        "max_model_len": service.cache.capacity,
        "layerskip": {
            "num_layers": decoder.num_layers,
            "adapted_exits": list(decoder.adapted_exits),
            "max_model_len": service.cache.capacity,
            "chat": service.has_chat,
        },
    }
