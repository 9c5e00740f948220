"""GET /v1/models and /v1/models/{id}. Knows the one served model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.errors import ApiError, shorten
from server.schema.models import Model, ModelList
from server.service import Phase, Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", response_model=ModelList, summary="List the served model")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/v1/models/{model:path}", response_model=Model, summary="Describe the served model")
    async def get_model(model: str) -> dict[str, Any]:
        if model != service.model_name:
            message = f"The model '{shorten(model)}' does not exist."
            raise ApiError(404, message, param="model", code="model_not_found")
        return _model(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    loaded = service.phase in (Phase.READY, Phase.DRAINING) and service.failure is None
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "quire",
        "max_model_len": service.info.max_model_len if loaded and service.started.is_set() else None,
    }
