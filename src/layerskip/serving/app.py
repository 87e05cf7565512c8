"""The server as an ASGI app."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from layerskip.errors import LayerSkipError
from layerskip.language_model import LanguageModel
from layerskip.machine import __version__
from layerskip.serving.config import ServerConfig
from layerskip.serving.observability.metrics import ServerMetrics
from layerskip.serving.observability.recorder import Recorder
from layerskip.serving.observability.tracing import make_tracer
from layerskip.serving.playground.routes import make_router
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.invalid import explain
from layerskip.serving.routes import chat, completions, models, pages, responses, tokens
from layerskip.serving.safety.keys import Keys
from layerskip.serving.safety.middleware import Gate
from layerskip.serving.service import Service


def create_app(lm: LanguageModel, config: ServerConfig) -> FastAPI:
    """An app that serves one model; its memory is reserved here, its engine runs while the app does.

    Args:
        lm: The model.
        config: How to serve it.

    Raises:
        InvalidArgumentError: A bad key file, or sizes that don't fit each other.
        TokenizerError: The checkpoint has no tokenizer.
        OutOfMemoryError: The cache doesn't fit.
    """
    keys = None if config.api_key_file is None else Keys.read(config.api_key_file)
    metrics = ServerMetrics(config.served_name or lm.checkpoint.name)
    tracer = make_tracer(config.otlp_endpoint)
    recorder = Recorder(metrics, tracer, tokenizer=lm.text_tokenizer, log_prompts=config.log_prompts)
    service = Service.of(lm, config, created=int(time.time()), observer=recorder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()
        if tracer is not None:
            tracer.close()

    app = FastAPI(
        title="layerskip",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # a page of ours is in its place: FastAPI's fetches scripts from elsewhere
        redoc_url=None,
    )
    app.state.service, app.state.metrics = service, metrics
    answering = (models.router, completions.router, chat.router, responses.router, tokens.router)
    for router in (*answering, pages.router, make_router()):
        app.include_router(router)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(LayerSkipError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_error)  # which uvicorn logs as well
    app.add_middleware(Gate, config=config, keys=keys)
    return app


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    made = api_error(error)
    return JSONResponse(made.body, made.status, headers=made.headers)


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _answer_error(_, explain(error.errors()))


async def _answer_http(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {http.url.path[:200]!r} here; see /docs",
        405: f"{http.method} is not for {http.url.path[:200]!r}; see /docs",
    }.get(error.status_code, str(error.detail))
    return await _answer_error(http, ApiError(error.status_code, message, headers=error.headers))
