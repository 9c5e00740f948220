"""`create_app`: the ASGI application as a value.

Knows how the parts fit together and nothing else. There is no state in modules: everything hangs off the
app's `state.service`, so a process may hold as many apps as it likes, and tests make one each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from engine.client import EngineClient
from engine.errors import QuireError
from server import __version__, docs
from server.errors import ApiError, shorten, to_api_error
from server.middleware.auth import Auth
from server.middleware.limits import Limits
from server.middleware.phase import PhaseGate
from server.middleware.request_log import RequestLog
from server.prompts import Template, Tokenizer
from server.routes import (
    cache,
    chat,
    completions,
    embeddings,
    messages,
    models,
    operations,
    responses,
    tokens,
    ui,
)
from server.service import Service
from server.settings import ServerSettings
from server.trail import Tracer

NO_DEFAULTS: Mapping[str, float] = MappingProxyType({})
DESCRIPTION = "Serves a language model from a paged KV cache. Speaks the OpenAI API."


def create_app(
    client: EngineClient,
    settings: ServerSettings,
    tokenizer: Tokenizer,
    template: Template | None = None,
    sampling_defaults: Mapping[str, float] = NO_DEFAULTS,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Builds the application.

    Args:
        client: not started yet; the app's lifespan starts and stops it.
        tokenizer, template: the model's own, from engine.text. Without a template only completions work.
        sampling_defaults: for fields of SamplingParams that a request leaves out.
        tracer: told of each generation request that ended.
    """
    service = Service(client, settings, tokenizer, template, sampling_defaults)
    app = FastAPI(
        title="Quire",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # FastAPI's own would start by an environment variable that is not one of our settings.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    for routes in (chat, completions, responses, messages, embeddings, models, operations, tokens, cache):
        app.include_router(routes.router(service))
    page = ui.files() if settings.ui else {}
    if page:
        app.include_router(ui.router(page))
    _add_docs(app)
    _add_error_handlers(app)
    # The last one added is the first to see a request.
    app.add_middleware(PhaseGate, service=service)
    app.add_middleware(Auth, tenants=service.tenants, public=ui.public_paths(page) if page else ())
    app.add_middleware(Limits, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(
        RequestLog,
        metrics=service.metrics,
        access_log=settings.access_log,
        model_name=settings.model_name,
        tracer=tracer,
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.begin()
    try:
        yield
    finally:
        await service.end()


def _add_docs(app: FastAPI) -> None:
    def description() -> dict[str, Any]:
        return docs.openapi(app)

    app.openapi = description  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> dict[str, Any]:
        return description()

    @app.get("/docs", include_in_schema=False)
    async def docs_page(request: Request) -> Response:
        base_url = f"{request.url.scheme}://{request.headers.get('host', 'localhost')}"
        return HTMLResponse(docs.page(description(), base_url))


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, ApiError | QuireError)
        return to_api_error(exc).response()

    async def on_http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        where = f"{request.method} {shorten(request.scope['path'], 100)}"
        if exc.status_code == 405:
            exc.headers = {"allow": _methods_at(request)}
        messages = {404: f"Unknown address: {where}.", 405: f"Method not allowed: {where}."}
        message = messages.get(exc.status_code, str(exc.detail))
        return ApiError(exc.status_code, message, headers=exc.headers).response()

    def _methods_at(request: Request) -> str:
        """Of all routes with this address, by its own name if it has one; the framework names those of the
        first alone."""
        path = request.scope["path"]
        here = [route for route in iter_route_contexts(request.app.routes) if route.path_regex.match(path)]
        named = [route for route in here if route.path == path]
        return ", ".join(sorted({method for route in named or here for method in route.methods or ()}))

    async def on_disconnect(_: Request, exc: Exception) -> Response:
        # Nobody reads this; the status only shows in the log and the metrics.
        return ApiError(499, "The client closed the request.", code="client_closed_request").response()

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(QuireError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
