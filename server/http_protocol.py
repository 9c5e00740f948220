"""The HTTP/1.1 connection: uvicorn's, with limits on heads, waits and readers.

Knows sockets, bytes and time; does not know paths or requests' meaning. uvicorn's parser is fast because it
asks nothing of a connection: a head may be endless, may take forever, and a reader that stops reading parks
its stream. Here each of those has a limit, at no cost per streamed token: the clock is only looked at when a
head begins, when a body dawdles, and when the socket stops taking bytes.

    connection made ---head_timer---> head complete ---body_timer---> body complete ... reply ... keep-alive
                                                                    \\-stall_timer-/ while the reader is stuck
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError
from server.settings import ServerSettings

MAX_HEADERS = 128
MAX_URL_BYTES = 8192
# A body that has started must go on at least this fast.
MIN_BODY_BYTES_PER_S = 4096


class _Refused(Exception):
    """Stops the parser; the reply is in `_refusal`."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Subclassed per server by `limited_protocol`, since uvicorn makes the instances."""

    settings: ClassVar[ServerSettings] = ServerSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusal: ApiError | None = None
        self._in_head = True
        self._head_bytes = 0  # read from the socket since the head began, also when no header is whole yet
        self._header_bytes = 0  # of the headers that are whole
        self._body_bytes = 0
        self._body_since_s = 0.0
        self._timer: TimerHandle | None = None
        self._stall_timer: TimerHandle | None = None

    # --- the connection ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse_now(ApiError(503, "Too many connections.", headers={"retry-after": "1"}))
            return
        self._arm(self.settings.header_timeout_s, self._head_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._arm(self.settings.header_timeout_s, self._head_timed_out)
        super().data_received(data)
        # Only a head that is still open counts in full: the last read may hold the start of a body.
        if self._in_head and self._head_bytes > self.settings.max_header_bytes and self._refusal is None:
            self._refuse_now(self._head_too_large())

    # --- the head ---

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop_parser(ApiError(414, f"The address is longer than {MAX_URL_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._header_bytes > self.settings.max_header_bytes:
            self._stop_parser(self._head_too_large())

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._body_bytes = 0
        self._body_since_s = self.loop.time()
        self._arm(self.settings.body_timeout_s, self._check_body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        # What comes next on this connection is a head again.
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def _head_too_large(self) -> ApiError:
        return ApiError(
            431,
            f"The headers are larger than {self.settings.max_header_bytes} bytes or more than {MAX_HEADERS}.",
        )

    # --- waits ---

    def _head_timed_out(self) -> None:
        if self._head_bytes:
            self._refuse_now(ApiError(408, "The request's headers did not arrive in time."))
        else:
            self.transport.close()

    def _check_body(self) -> None:
        """A body has its timeout to come, and more time the more of it has come."""
        allowed_s = self.settings.body_timeout_s + self._body_bytes / MIN_BODY_BYTES_PER_S
        left_s = self._body_since_s + allowed_s - self.loop.time()
        if left_s > 0:
            self._arm(max(left_s, 0.05), self._check_body)
        else:
            self._refuse_now(ApiError(408, "The request's body did not arrive in time."))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None and self.settings.stall_timeout_s:
            self._stall_timer = self.loop.call_later(self.settings.stall_timeout_s, self._stalled)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _stalled(self) -> None:
        self.logger.warning("Dropped a connection whose reader did not keep up.")
        self.transport.abort()

    def _arm(self, seconds: float, callback: Any) -> None:
        self._disarm()
        if seconds:
            self._timer = self.loop.call_later(seconds, callback)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- refusals below the application ---

    def _stop_parser(self, error: ApiError) -> None:
        self._refusal = error
        raise _Refused

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the parser gave up, for its own reasons or for ours."""
        self._refuse_now(self._refusal or ApiError(400, "The request is not valid HTTP."))

    def _refuse_now(self, error: ApiError) -> None:
        self._refusal = error
        self._disarm()
        replying = self.cycle is not None and not self.cycle.response_complete
        if not (replying and self.cycle.response_started) and not self.transport.is_closing():
            self.transport.write(_plain_reply(error))
        if replying:
            # Its application still waits for the body: let it see that nobody is there.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _plain_reply(error: ApiError) -> bytes:
    headers = b"".join(b"%b: %b\r\n" % header for header in error.raw_headers())
    return b"%b%bconnection: close\r\n\r\n%b" % (STATUS_LINE[error.status], headers, error.body())


def limited_protocol(limits: ServerSettings) -> type[LimitedProtocol]:
    """The class with one server's limits."""

    class Protocol(LimitedProtocol):
        settings = limits

    return Protocol
