"""Each request's id, its count in the metrics, its end in log and trace; and the last net under errors.

Knows the request line and the status; never bodies, queries or keys. Whatever clients send is cut, escaped
and kept on one line. The id in replies is the caller's `x-request-id` if it is harmless, else a new one;
inside, only ids of our own making are used.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import request_lines
from server.errors import ApiError
from server.log import request_id
from server.metrics import Metrics
from server.trail import Tracer, Trail

logger = logging.getLogger("quire")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
MAX_PATH_CHARS = 128
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_ANTHROPIC = "/v1/messages"  # whose clients read the id under a name of their own
# Asked every few seconds by probes: lines of no news.
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class RequestLog:
    """The outermost of our layers.

    Args:
        access_log: write a line about each request that was answered.
        tracer: told of each generation request that ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        access_log: bool,
        model_name: str = "",
        tracer: Tracer | None = None,
    ) -> None:
        self.app = app
        self._metrics = metrics
        self._access_log = access_log
        self._model_name = model_name
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trail = self._trail(scope)
        request_id.set(trail.request_id)
        status = 0

        async def tagging_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = trail.request_id
                if scope["path"].startswith(_ANTHROPIC):
                    headers["request-id"] = trail.request_id
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
            logger.exception("request %s broke the server's own code", trail.request_id)
            if status == 0:
                error = ApiError(
                    500, "The server had an internal error.", headers={"x-should-retry": "false"}
                )
                await error.response()(scope, receive, tagging_send)
        finally:
            self._metrics.active_requests -= 1
            trail.ended(status)
            self._note(scope, trail)

    def _trail(self, scope: Scope) -> Trail:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        client = (scope.get("client") or ("-",))[0]
        trail = Trail(_request_id(scope), method, scope["path"][:MAX_PATH_CHARS], client)
        if self._tracer is not None:
            trail.parents = _parents(scope)
        trail.attach(scope)
        return trail

    def _note(self, scope: Scope, trail: Trail) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http[trail.method, route, trail.status] += 1
        trace_id = ""
        if self._tracer is not None and trail.api:
            trace_id = self._tracer.ended(trail, self._model_name)
        if self._access_log and scope["path"] not in _QUIET:
            request_lines.answered(trail, trace_id)


def _request_id(scope: Scope) -> str:
    sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _SAFE_ID.fullmatch(sent[0]):
        return str(sent[0], "ascii")
    return "req-" + secrets.token_hex(8)


def _parents(scope: Scope) -> dict[str, str]:
    """The caller's place in a trace, as W3C writes it; two of them would be anybody's guess."""
    parents: dict[str, str] = {}
    for name in (b"traceparent", b"tracestate"):
        sent = [value for key, value in scope["headers"] if key == name]
        if len(sent) == 1:
            parents[name.decode()] = sent[0].decode("latin-1")
    return parents
