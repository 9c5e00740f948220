"""/health, /ready, /metrics, /version: what operators and their probes ask. Knows phases and health only."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from server import __version__
from server.errors import ApiError
from server.metrics import CONTENT_TYPE
from server.middleware.auth import admin_if_any
from server.routes.common import check_ready
from server.service import Phase, Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", summary="Is the engine alive and making progress?")
    async def health() -> Response:
        """200 also while starting and draining: restarting the process would help neither."""
        trouble = _trouble(service)
        if trouble is not None:
            raise ApiError(
                503, f"The engine is not healthy: {trouble.rstrip('.')}.", code="engine_unavailable"
            )
        return JSONResponse({"status": "ok", "phase": service.phase.value})

    @routes.get("/ready", summary="Should traffic be sent here?")
    async def ready() -> Response:
        """503 while starting, draining, or without a healthy engine."""
        check_ready(service)
        if _trouble(service) is not None:
            raise ApiError(503, "The engine is not healthy.", code="engine_unavailable")
        return JSONResponse({"status": "ready"})

    @routes.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        # They tell of all tenants: what one reuses is nothing the others should be able to watch.
        dependencies=[Depends(admin_if_any)],
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @routes.get("/version", summary="The server's version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    return routes


def _trouble(service: Service) -> str | None:
    if service.phase is Phase.FAILED:
        return "it could not start"
    return service.client.health() if service.started.is_set() else None
