"""One request: send it, time what comes back, name what went wrong. Knows the API's JSON, not the load."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server.bench.wire import (
    Connection,
    EventParser,
    OnBody,
    RequestWriter,
    ResponseParser,
    WireError,
    connect,
)

DONE = b"[DONE]"


class RequestError(Exception):
    """A request failed. `kind` groups such failures; the message is one example of them."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message or kind)
        self.kind = kind
        self.message = message or kind


@dataclass(slots=True)
class Record:
    """What one request measured. Times are seconds on the clock of `time.perf_counter`.

    Attributes:
        start_s: when it was due: sent at once in a closed loop, its arrival in an open one.
        text_s: when each chunk with text arrived.
        output_tokens: by the server's usage; -1 where it sent none.
    """

    start_s: float
    end_s: float = 0.0
    text_s: array[float] = field(default_factory=lambda: array("d"))
    chunks: int = 0
    prompt_tokens: int = -1
    output_tokens: int = -1
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: RequestError | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int = -1
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class StreamReader:
    """Fills a record from the bytes of one streamed reply."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.error_body = b""
        self.saw_done = False
        self._events = EventParser()

    def on_body(self, response: ResponseParser, body: bytes) -> None:
        if response.status != 200:
            self.error_body += body
            return
        now = time.perf_counter()
        for data in self._events.feed(body):
            if data == DONE:
                self.saw_done = True
            else:
                self._on_chunk(data, now)

    def _on_chunk(self, data: bytes, now: float) -> None:
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            raise RequestError("bad chunk", f"{error}: {data[:200]!r}") from None
        record = self.record
        record.chunks += 1
        if chunk.error is not None:
            raise error_of("error in the stream", chunk.error)
        for choice in chunk.choices:
            delta = choice.delta
            if choice.text or (delta is not None and (delta.content or delta.reasoning_content)):
                record.text_s.append(now)
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
        if chunk.usage is not None:
            self._on_usage(chunk.usage)

    def _on_usage(self, usage: _Usage) -> None:
        self.record.prompt_tokens = usage.prompt_tokens
        self.record.output_tokens = usage.completion_tokens
        details = usage.prompt_tokens_details
        self.record.cached_tokens = (details.cached_tokens or 0) if details else 0


def error_of(kind: str, error: Any) -> RequestError:
    """From an OpenAI error object, or whatever stands in its place."""
    if isinstance(error, dict):
        inner = error.get("error", error)
        if isinstance(inner, dict):
            name = inner.get("code") or inner.get("type")
            message = str(inner.get("message") or inner)
            return RequestError(f"{kind} ({name})" if name else kind, message[:500])
    return RequestError(kind, str(error)[:500])


class ApiClient:
    """Connections to one server, kept open and used again.

    Args:
        url: scheme, host and an optional path; without /v1.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._requests = RequestWriter(url, api_key, "User-Agent: quire-bench", "Accept: */*")

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def stream(self, path: str, body: bytes, start_s: float | None = None) -> Record:
        """Posts a streaming request. Never raises for the server's faults: they are in the record."""
        record = Record(time.perf_counter() if start_s is None else start_s)
        reader = StreamReader(record)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._exchange("POST", path, body, reader.on_body)
            if response.status != 200:
                raise error_of(f"HTTP {response.status}", json_or_text(reader.error_body))
            if not reader.saw_done and record.finish_reason is None:  # some servers send no [DONE]
                raise RequestError("stream ended early", "no finish_reason and no [DONE] before the end")
        except RequestError as error:
            record.error = error
        except WireError as error:
            record.error = RequestError(str(error))
        except TimeoutError:
            record.error = RequestError("timeout", f"no end within {self._timeout_s:g} s")
        record.end_s = time.perf_counter()
        return record

    async def get_json(self, path: str) -> Any:
        """Raises RequestError."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._exchange("GET", path, b"", lambda _, data: body.extend(data))
        except WireError as error:
            raise RequestError(str(error)) from None
        except TimeoutError:
            raise RequestError("timeout") from None
        content = json_or_text(bytes(body))
        if response.status != 200:
            raise error_of(f"HTTP {response.status}", content)
        return content

    async def _exchange(self, method: str, path: str, body: bytes, on_body: OnBody) -> ResponseParser:
        request = self._requests.write(method, path, body)
        while True:
            connection = await self._connection()
            kept = connection.used
            try:
                response = await connection.exchange(request, on_body)
            except WireError as error:
                if kept and str(error) == "closed":
                    continue  # the server closed an idle connection; the request never reached it
                raise
            except BaseException:
                connection.close()  # a cancelled exchange leaves the reply half read
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return response

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return await connect(self._url)


def json_or_text(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body.decode("utf-8", "replace")
