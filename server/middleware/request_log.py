"""Each request's id, its line in the access log, its count in the metrics; and the last net under errors.

Knows the request line and the status; never bodies, queries or keys. Whatever clients send is cut, escaped
and kept on one line. The id in replies is the caller's `x-request-id` if it is harmless, else a new one;
inside, only ids of our own making are used.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.metrics import Metrics

logger = logging.getLogger("quire")
access_logger = logging.getLogger("quire.access")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_MAX_PATH_CHARS = 128
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
# Asked every few seconds by probes: lines of no news.
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class RequestLog:
    """The outermost of our layers."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool) -> None:
        self.app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started_s = time.monotonic()
        status = 0

        async def tagging_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.active_requests += 1
        try:
            await self.app(scope, receive, tagging_send)
        except asyncio.CancelledError:
            # The server is being forced down; the reply said so already, if it had begun.
            if status == 0:
                await ApiError(503, "The server shut down.", code="shutting_down").response()(
                    scope, receive, tagging_send
                )
        except Exception:
            logger.exception("request %s broke the server's own code", request_id)
            if status == 0:
                error = ApiError(
                    500, "The server had an internal error.", headers={"x-should-retry": "false"}
                )
                await error.response()(scope, receive, tagging_send)
        finally:
            self._metrics.active_requests -= 1
            self._note(scope, status, time.monotonic() - started_s, request_id)

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http[method, route, status] += 1
        if self._access_log and scope["path"] not in _QUIET:
            access_logger.info(
                "%s %s %s %d %.1fms %s",
                (scope.get("client") or ("-",))[0],
                method,
                json.dumps(scope["path"][:_MAX_PATH_CHARS]),
                status,
                seconds * 1000,
                request_id,
            )


def _request_id(scope: Scope) -> str:
    sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _SAFE_ID.fullmatch(sent[0]):
        return str(sent[0], "ascii")
    return "req-" + secrets.token_hex(8)
