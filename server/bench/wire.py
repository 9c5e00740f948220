"""HTTP/1.1 and server-sent events over one asyncio connection.

`ResponseParser` and `EventParser` are fed bytes and do no I/O; `Connection` is the asyncio protocol around
them. Only what a load generator needs: one request at a time, no redirects, no compression.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 * 1024


class WireError(Exception):
    """The connection broke, or the peer does not speak HTTP/1.1."""


class ResponseParser:
    """One HTTP/1.1 response, fed in any pieces.

    Attributes:
        status: 0 until the head is complete.
        headers: names in lower case.
        done: the body is complete.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = b""
        self._chunked = False
        self._left: int | None = None  # body (or chunk) bytes still to come; None is until the peer closes
        self._skip = 0  # bytes of the line end after a chunk
        self._in_trailer = False

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can carry another request."""
        framed = self._chunked or self._left is not None
        return self.done and framed and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """Returns the body bytes found in `data`."""
        if not self.status:
            data = self._buffer + data
            self._buffer = b""
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise WireError("response head too long")
                self._buffer = data
                return b""
            self._parse_head(data[:end])
            data = data[end + 4 :]
        if self._chunked:
            return self._feed_chunked(data)
        return self._feed_plain(data)

    def feed_eof(self) -> None:
        """The peer closed. Completes a body that ends so, and raises for any other."""
        if self.status and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            raise WireError("connection closed in the middle of a response" if self.status else "closed")

    def _parse_head(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise WireError("not an HTTP/1.1 response")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        status = int(rest[:3])
        if status < 200:
            raise WireError(f"unexpected interim response {status}")
        self.status = status
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._chunked:
            self._left = 0
        elif "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
        elif status in (204, 304):
            self._left = 0

    def _feed_plain(self, data: bytes) -> bytes:
        if self._left is None:
            return data
        body = data[: self._left]
        self._left -= len(body)
        self.done = self._left == 0
        return body

    def _feed_chunked(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        parts: list[bytes] = []
        position, length = 0, len(data)
        while position < length and not self.done:
            if self._left:
                part = data[position : position + self._left]
                parts.append(part)
                position += len(part)
                self._left -= len(part)
                if not self._left:
                    self._skip = 2
                continue
            if self._skip:
                step = min(self._skip, length - position)
                position += step
                self._skip -= step
                continue
            end = data.find(b"\r\n", position)
            if end < 0:
                self._buffer = data[position:]
                break
            self._chunk_line(data[position:end])
            position = end + 2
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_line(self, line: bytes) -> None:
        if self._in_trailer:
            self.done = not line
            return
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise WireError("bad chunk size") from None
        self._in_trailer = self._left == 0


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
        self._on_body: Callable[[ResponseParser, bytes], None] | None = None
        self._finished: asyncio.Future[ResponseParser] | None = None

    @property
    def reusable(self) -> bool:
        open_still = self._transport is not None and not self._transport.is_closing()
        return open_still and self._finished is None and (not self.used or self._parser.keep_alive)

    async def exchange(
        self, request: bytes, on_body: Callable[[ResponseParser, bytes], None]
    ) -> ResponseParser:
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
