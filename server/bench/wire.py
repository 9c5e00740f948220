"""HTTP/1.1 and server-sent events over one asyncio connection.

`ResponseParser` (around httptools, as in the server) and `EventParser` are fed bytes and do no I/O;
`Connection` is the asyncio protocol around them. Only what a load generator needs: one request at a time, no
redirects, no compression.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEAD_BYTES = 64 * 1024


class WireError(Exception):
    """The connection broke, or the peer does not speak HTTP/1.1."""


class RequestWriter:
    """Requests to one API, as bytes.

    Args:
        url: scheme, host and an optional path, which stands before the path of each request.
        headers: whole lines that every request has.
    """

    def __init__(self, url: str, api_key: str | None, *headers: str) -> None:
        parts = urlsplit(url)
        self._prefix = parts.path
        key = [f"Authorization: Bearer {api_key}"] if api_key else []
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", *headers, *key]
        self._common_head = "".join(f"{line}\r\n" for line in lines)

    def write(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._common_head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body


class ResponseParser:
    """One HTTP/1.1 response, fed in any pieces. Interim ones before it are passed over.

    Attributes:
        status: 0 until the head is complete.
        done: the body is complete.
        keep_alive: then, whether the connection can carry another request.
    """

    def __init__(self) -> None:
        self.status = 0
        self.done = self.keep_alive = False
        self._parser = HttpResponseParser(self)
        self._fed_bytes = 0
        self._framed = False  # the head says where the body ends; else the peer closes there
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """Returns the body bytes found in `data`."""
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if not self.done:  # else it is about bytes that nobody asked for
                what = "a broken" if self.status else "not an"
                raise WireError(f"{what} HTTP/1.1 response") from None
        self._fed_bytes += len(data)
        if not self.status and self._fed_bytes > MAX_HEAD_BYTES:
            raise WireError("response head too long")
        body = b"".join(self._body)
        self._body.clear()
        return body

    def feed_eof(self) -> None:
        """The peer closed. Completes a body that ends so, and raises for any other."""
        if self.status and not self._framed:
            self.done = True
        if not self.done:
            raise WireError("connection closed in the middle of a response" if self.status else "closed")

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.status = 0 if status < 200 else status

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.done = bool(self.status)
        self.keep_alive = self._parser.should_keep_alive()


OnBody = Callable[[ResponseParser, bytes], None]


class EventParser:
    """Server-sent events, fed in any pieces; only their data matters here."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the data of each event that `data` completes."""
        if self._buffer:
            data = self._buffer + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._buffer = data.split(b"\n\n")
        return [payload for event in events if (payload := _data_of(event)) is not None]


def _data_of(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Made by `connect`."""

    def __init__(self) -> None:
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._on_body: OnBody | None = None
        self._finished: asyncio.Future[ResponseParser] | None = None

    @property
    def reusable(self) -> bool:
        open_still = self._transport is not None and not self._transport.is_closing()
        return open_still and self._finished is None and (not self.used or self._parser.keep_alive)

    async def exchange(self, request: bytes, on_body: OnBody) -> ResponseParser:
        """Sends a request and calls `on_body` as its body arrives; returns when it is complete.

        Raises:
            WireError: the response did not complete. Anything `on_body` raises comes out here too.
        """
        if self._transport is None or self._transport.is_closing():
            raise WireError("closed")
        self.used = True
        self._parser = ResponseParser()
        self._on_body = on_body
        self._finished = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._finished
        finally:
            self._finished = None
            self._on_body = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        if self._finished is None or self._finished.done() or self._on_body is None:
            self.close()  # bytes that nobody asked for
            return
        try:
            body = self._parser.feed(data)
            if body:
                self._on_body(self._parser, body)
        except Exception as error:
            self._finished.set_exception(error)
            self.close()
            return
        if self._parser.done:
            self._finished.set_result(self._parser)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._finished is None or self._finished.done():
            return
        try:
            self._parser.feed_eof()
            self._finished.set_result(self._parser)
        except WireError as error:
            self._finished.set_exception(WireError("connection reset") if exc else error)


async def connect(url: str) -> Connection:
    """Raises WireError where nobody answers."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context() if secure else None
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(Connection, host, port, ssl=context)
    except ConnectionRefusedError:
        raise WireError("connection refused") from None
    except OSError as error:
        raise WireError(f"cannot connect: {error.strerror or error}") from None
    return connection
