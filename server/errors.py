"""What went wrong, as OpenAI clients expect to hear it: one table from exception to status, type and code.

Knows every error of the engine and the shape of the reply; does not know which route was asked. Only a
RequestError's own message reaches the caller: it was written for them. All others get a fixed sentence, so
that no path, address or foreign text can leak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine import errors as engine_errors

INVALID = "invalid_request_error"
SERVER = "server_error"

RETRY_AFTER_S = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `message` None shows the exception's own."""

    status: int
    type: str
    code: str
    message: str | None = None
    retry_after_s: int | None = None


_START_UP = Row(500, SERVER, "configuration_error", "The server is not configured correctly.")

TABLE: Mapping[type[engine_errors.QuireError], Row] = {
    engine_errors.ConfigError: _START_UP,
    engine_errors.ModelError: _START_UP,
    engine_errors.MemoryPlanError: _START_UP,
    engine_errors.RequestError: Row(400, INVALID, "invalid_value"),
    engine_errors.InvalidRequest: Row(400, INVALID, "invalid_value"),
    engine_errors.ContextTooLong: Row(400, INVALID, "context_length_exceeded"),
    engine_errors.NeverFits: Row(400, INVALID, "request_too_large"),
    engine_errors.Overloaded: Row(
        429, "rate_limit_error", "queue_full", "The queue is full; try again shortly.", RETRY_AFTER_S
    ),
    engine_errors.Draining: Row(
        503, SERVER, "shutting_down", "The server is shutting down and takes no new requests.", RETRY_AFTER_S
    ),
    engine_errors.RequestFailed: Row(
        500, SERVER, "request_failed", "This request failed inside the engine. Others are not affected."
    ),
    engine_errors.EngineDead: Row(
        503, SERVER, "engine_unavailable", "The engine stopped. A new one is being started.", RETRY_AFTER_S
    ),
    engine_errors.QuireError: Row(500, SERVER, "internal_error", "The server had an internal error."),
}

# For what the HTTP layer itself refuses, by status.
_HTTP_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}

# Paths of Anthropic's API, whose clients expect its shape of errors, and its types by status.
_ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A refusal that is ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _HTTP_CODES.get(status, "error")
        self.kind = kind or (SERVER if status >= 500 else INVALID)
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as OpenAI writes it."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def anthropic_body(self) -> bytes:
        """The error as Anthropic writes it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else INVALID)
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": self.message}})

    def response(self) -> Response:
        return _ErrorResponse(self)

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers as ASGI wants them, for those who answer below the framework."""
        named = {"content-type": "application/json", "content-length": str(len(self.body())), **self.headers}
        return [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in named.items()]


class _ErrorResponse(Response):
    """In the shape that the request's path calls for, whoever refuses it."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, error.headers, media_type="application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in _ANTHROPIC_PATHS:
            self.body = self._error.anthropic_body()
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The request says something that cannot be."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, hint: str = "") -> ApiError:
    """A parameter that this server cannot honour."""
    advice = f": {hint}" if hint else ""
    return ApiError(
        400, f"{param} is not supported by this server{advice}.", param=param, code="unsupported_parameter"
    )


def shorten(text: str, limit: int = 64) -> str:
    """Text from a request, fit to be repeated in a message: short, printable, one line."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut.encode("unicode_escape", "backslashreplace").decode("ascii")


def to_api_error(exc: ApiError | engine_errors.QuireError) -> ApiError:
    """Looks an engine's error up in the table, nearest class first."""
    if isinstance(exc, ApiError):
        return exc
    row = next(TABLE[cls] for cls in type(exc).__mro__ if cls in TABLE)
    headers: dict[str, str] = {}
    if row.retry_after_s is not None:
        headers["retry-after"] = str(_retry_after_s(exc, row.retry_after_s))
    if row.status == 500:
        # The same request would break again: tell SDKs not to repeat it.
        headers["x-should-retry"] = "false"
    return ApiError(
        row.status,
        row.message or str(exc),
        param=getattr(exc, "param", None),
        code=row.code,
        kind=row.type,
        headers=headers,
    )


def _retry_after_s(exc: engine_errors.QuireError, default_s: int) -> int:
    wanted_s = getattr(exc, "retry_after_s", default_s)
    return max(1, min(600, round(wanted_s)))
