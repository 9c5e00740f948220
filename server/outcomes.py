"""What each operation may answer, for the API's description: statuses, their shapes, and streams.

Knows addresses and wire models; does not know handlers. The tests hold every reply of the server to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from server.middleware.auth import PUBLIC_PATHS
from server.middleware.phase import ALWAYS
from server.schema.errors import AnthropicErrorReply, ErrorReply
from server.schema.streams import ChatChunk, CompletionChunk, MessageEvent, ResponseEvent

REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request is at fault; `param` names the field.",
    "401": "An API key is missing or wrong.",
    "403": "Only an admin key may do this.",
    "404": "No such model, block or response.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; try again after Retry-After.",
    "500": "This request failed; others are not affected.",
    "503": "Starting, shutting down, or without an engine; try again after Retry-After.",
}
_OF_BODIES = frozenset({"404", "408", "413", "415", "429"})
_ADMIN_PATHS = ("/v1/cache", "/v1/cache/blocks/", "/v1/cache/reset", "/v1/cache/events", "/metrics")
_WATCHED = "/v1/cache/events"
# Neither says of itself that it is not ready.
_NEVER_503 = ALWAYS - {"/health", "/ready"}

STREAMS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatChunk,
    "/v1/completions": CompletionChunk,
    "/v1/responses": ResponseEvent,
    "/v1/messages": MessageEvent,
}
_HOW_THEY_END = {
    "/v1/chat/completions": "Ends with `data: [DONE]`",
    "/v1/completions": "Ends with `data: [DONE]`",
    "/v1/responses": "From `response.created` on",
    "/v1/messages": "From `message_start` to `message_stop`",
}


def describe_outcomes(path: str, operation: dict[str, Any]) -> None:
    """Completes what an operation says of its replies."""
    responses = operation["responses"]
    responses.pop("422", None)  # this server answers 400
    schema = _reference(_error_model(path))
    for status in _statuses(path, has_body="requestBody" in operation):
        content = {"application/json": {"schema": schema}}
        responses[status] = {"description": _ERRORS[status], "content": content}
    if path in STREAMS:
        content = responses["200"]["content"]
        content["text/event-stream"] = _events(path, STREAMS[path])
    elif path == _WATCHED:
        responses["200"]["content"] = {"text/event-stream": {"itemSchema": _POOL_EVENT}}
    elif path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}


def _statuses(path: str, *, has_body: bool) -> Iterator[str]:
    for status in _ERRORS:
        if status == "401":
            applies = path not in PUBLIC_PATHS
        elif status == "403":
            applies = path.startswith(_ADMIN_PATHS) and not has_body
        elif status == "404":
            applies = has_body or "{" in path
        elif status == "429":
            applies = has_body or path == _WATCHED
        elif status == "503":
            applies = path not in _NEVER_503
        else:
            applies = has_body or status not in _OF_BODIES
        if applies:
            yield status


def _error_model(path: str) -> type[BaseModel]:
    return AnthropicErrorReply if path.startswith("/v1/messages") else ErrorReply


def _events(path: str, model: type[BaseModel]) -> dict[str, Any]:
    """As OpenAPI 3.2 describes streams: event by event."""
    content = {"anyOf": [_reference(model), _reference(_error_model(path))]}
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": content,
    }
    if "DONE" in _HOW_THEY_END[path]:
        data = {"anyOf": [data, {"const": "[DONE]"}]}
    return {
        "itemSchema": {
            "type": "object",
            "description": f"With stream: true. {_HOW_THEY_END[path]}.",
            "properties": {"event": {"type": "string"}, "data": data},
            "required": ["data"],
        }
    }


_POOL_EVENT = {
    "type": "object",
    "description": "For the live page. Goes on until its reader goes.",
    "properties": {
        "event": {"enum": ["hello", "pool", "sample", "engine"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"type": "object"},
        },
    },
    "required": ["event", "data"],
}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": REF.format(model=model.__name__)}
