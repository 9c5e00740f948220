"""Refuses requests whose headers are already wrong, before anything is read or routed.

Knows Host, Content-Length and Transfer-Encoding; does not know bodies (jsonbody.py counts those) or
sockets (http_protocol.py limits heads and waits).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.jsonbody import too_large

_HOST = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")


class Limits:
    """Looks at three headers of each request."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        hosts, lengths, codings = [], [], []
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                lengths.append(value)
            elif name == b"transfer-encoding":
                codings.append(value)
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            return _bad("The request must have one Host header.")
        if hosts and not _HOST.fullmatch(hosts[0]):
            return _bad("The Host header is not a host name with an optional port.")
        return self._length_error(lengths, codings)

    def _length_error(self, lengths: list[bytes], codings: list[bytes]) -> ApiError | None:
        if codings and lengths:
            return _bad("Content-Length and Transfer-Encoding cannot be used together.")
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            return _bad("The only Transfer-Encoding is chunked.")
        if len(lengths) > 1 or (lengths and not _LENGTH.fullmatch(lengths[0])):
            return _bad("Content-Length is not one whole number.")
        if lengths and int(lengths[0]) > self._max_body_bytes:
            return too_large(self._max_body_bytes)
        return None


def _bad(message: str) -> ApiError:
    return ApiError(400, message, headers={"connection": "close"})
