"""While the server drains: nothing new, and connections close after their reply.

Knows the phase and which paths answer in every phase. Streams that began before are not touched.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service import Phase, Service

ALWAYS = frozenset({"/health", "/ready", "/metrics", "/version"})


class PhaseGate:
    """Passes everything until the drain begins."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._service.phase is not Phase.DRAINING:
            await self.app(scope, receive, send)
            return
        refusal = self._service.why_not_ready()
        if scope["path"] not in ALWAYS and refusal is not None:
            if scope["method"] == "POST":
                self._service.metrics.refused["draining"] += 1
            await refusal.response()(scope, receive, send)
            return

        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self.app(scope, receive, closing_send)
